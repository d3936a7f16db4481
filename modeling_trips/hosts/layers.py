"""Wrapper modules and the selection layer that all patched models share."""

from collections.abc import Mapping
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from ..modeling_trips_vision import TripsSelection
from ..patch_selection import FUSED_TOKEN, choose_tokens, random_scores, score_tokens, shorten_tokens
from ..schedule_trips import LayerSelection


NO_UNIT = -2  # index of a unit that a shorter row of a record lacks


# ---- Modules that replace those of a model -------------------------------------------------------------------------


class ModuleWrapper(nn.Module):
    """
    Wrapper that replaces one module of a patched model. It shares the module's dictionaries of parameters, buffers,
    sub-modules and hooks, so names and objects in `state_dict`, optimizers and adapters do not change. It inherits
    from the module's class, so hooks and wrapping policies that look for the class find it.

    `transformers.monkey_patching` swaps classes while a model is built, for all models and layers. This class replaces
    single layers of an existing model.
    """

    @classmethod
    def of(cls, wrapped_module: nn.Module, **attributes) -> "ModuleWrapper":
        """Wrap `wrapped_module` and add `attributes`."""
        wrapper = new_of_class(cls, type(wrapped_module))
        wrapper.__dict__.update(vars(wrapped_module))
        # `wrapped_module` is not registered as a sub-module, so no parameter appears twice.
        wrapper.__dict__.update(attributes, wrapped_module=wrapped_module, own_attributes=tuple(attributes))
        return wrapper

    def restore(self) -> nn.Module:
        """Return the wrapped module with attributes that were set meanwhile, such as `training`."""
        own = {*self.own_attributes, "own_attributes", "wrapped_module", "_compiled_call_impl"}
        for name, value in vars(self).items():
            if name not in own:
                self.wrapped_module.__dict__[name] = value
        return self.wrapped_module

    def __reduce_ex__(self, protocol):
        return new_of_class, type(self).__bases__, vars(self)


@cache
def _combine(*classes: type) -> Any:
    """Return a class with the last one's name, which Accelerate and Transformers look for."""
    return type(classes[-1].__name__, classes, {"__module__": classes[-1].__module__})


def new_of_class(*classes: type):
    """Return an empty object of all these classes. Pickle and `copy.deepcopy` make wrappers by it."""
    return nn.Module.__new__(_combine(*classes))


def library_name(library_class: type) -> str | None:
    """Return the name of a class of Transformers, timm or vLLM, `None` for others. No model module is imported."""
    is_known = library_class.__module__.partition(".")[0] in ("transformers", "timm", "vllm")
    return library_class.__name__ if is_known else None


def lookup(table: Mapping[str, type], model_class: type) -> Any:
    """Return the entry for a class of a library, or for the nearest of its parents; `None` without one."""
    for base in model_class.__mro__:
        name = library_name(base)
        if name in table:
            return table[name]
    return None


def check_forward(module: nn.Module, name: str):
    """Raise a ValueError if a compiler or Accelerate has replaced the module's forward pass."""
    taken_over = {"forward", "_compiled_call_impl"} & vars(module).keys()
    if taken_over:
        raise ValueError(
            f"The forward pass of {name} must be its own, got a replaced one ({', '.join(taken_over)}). Load without "
            "`device_map`, apply patch selection, then compile or call `accelerate.dispatch_model`."
        )


# ---- Scores --------------------------------------------------------------------------------------------------------


ALL_ROWS = slice(None)


def is_plain_linear(module: nn.Module) -> bool:
    """
    Whether rows of the weight can be used. Adapters are other modules, torchao has other tensors, and the hooks of
    Accelerate load a weight for the forward pass.
    """
    is_plain = type(module) is nn.Linear and "forward" not in vars(module)
    return is_plain and type(module.weight) in (nn.Parameter, torch.Tensor)


def project_rows(linear: nn.Module, rows: slice, states: torch.Tensor) -> torch.Tensor:
    """
    Return these rows of a linear layer's output. Only a plain `nn.Linear` skips the others; adapters and quantized
    layers are called as a whole.
    """
    if rows == ALL_ROWS or not is_plain_linear(linear):
        return linear(states)[..., rows]
    bias = None if linear.bias is None else linear.bias[rows]
    return nn.functional.linear(states, linear.weight[rows], bias)


class Projections(NamedTuple):
    """The linear layers of an attention's queries and keys, and their rows in it."""

    query: nn.Module
    key: nn.Module
    num_heads: int
    query_rows: slice = ALL_ROWS
    key_rows: slice = ALL_ROWS

    @classmethod
    def stacked(cls, linear: nn.Module, width: int, num_heads: int) -> "Projections":
        """Return those of one layer that computes queries, keys and values."""
        return cls(
            query=linear,
            key=linear,
            num_heads=num_heads,
            query_rows=slice(0, width),
            key_rows=slice(width, 2 * width),
        )


def score_states(query: torch.Tensor, states: torch.Tensor, key_weight: torch.Tensor, scaling: float):
    """
    Compute `score_tokens` without the keys: q (W x) = (q W) x, so the layer projects the query instead of every token.
    The bias of the keys adds a constant to all tokens, which softmax ignores.

    `states` of shape `(batch_size, num_candidates, hidden_size)` are the inputs of the key projection. Its weight has
    shape `(num_heads * head_dim, hidden_size)`.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    with torch.autocast(states.device.type, enabled=False):  # rounding would tie patches
        num_heads = query.shape[1]
        weight = key_weight.to(dtype).unflatten(0, (num_heads, -1))  # (num_heads, head_dim, hidden_size)
        query = query.to(dtype) * scaling
        directions = torch.einsum("bhd,hdc->bhc", query, weight)  # (batch_size, num_heads, hidden_size)
        states = states.to(dtype).transpose(1, 2)
        logits = directions @ states  # (batch_size, num_heads, num_candidates)
    attention = logits.softmax(dim=-1)
    return attention.mean(dim=1)


# ---- The selection layer -------------------------------------------------------------------------------------------


class LayerRecord(NamedTuple):
    """
    Selection of one layer, in units.

    Args:
        kept (`torch.LongTensor`): `(num_images, num_kept)`; of a packed sequence those of all images in one row.
        candidates (`torch.LongTensor`): What they were chosen from, in the same form.
        scores (`torch.FloatTensor` or `list[torch.FloatTensor]`): `(num_images, num_candidates)`; of a packed sequence
            `(1, num_candidates)` for each image.
        num_kept (`list[int]`, *optional*): Of each image in a packed sequence.
    """

    kept: torch.Tensor
    candidates: torch.Tensor
    scores: torch.Tensor | list[torch.Tensor]
    num_kept: list[int] | None = None


# Not a dataclass: FSDP copies dataclasses among the arguments of a layer.
class SelectionPass:
    """
    Selections of all layers in one pass of images through a tower. The patches that become one visual token of a
    generative model are a unit; in other models a unit is a patch.
    """

    def __init__(self, num_units: list[int] | None = None, is_image: torch.Tensor | None = None):
        self.num_units = num_units  # of each image in a packed sequence
        self.is_image = is_image  # `(num_images, num_patches)`: False marks padding patches
        # In a tower that permutes units by windows: row-major number of each unit, and the boundaries of the windows.
        self.unit_order: torch.Tensor | None = None
        self.segments: torch.Tensor | None = None
        # The query of the prompt: `(num_images, num_heads, head_dim)`.
        self.query: torch.Tensor | None = None
        self.records: dict[int, LayerRecord] = {}  # by layer
        self.shortened: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.selects = True  # False: the pass is there for the attention alone
        # What a scorer after the tower may ask for: attention to all units of each image, `(num_units,)`.
        self.wants_attention = False
        self.attention: torch.Tensor | list[torch.Tensor] | None = None

    @property
    def grid_size(self) -> int:
        """Number of units in the grid of one image, after the first selection."""
        return self.records[min(self.records)].candidates.shape[-1]

    def record_before(self, layer: float) -> LayerRecord | None:
        """Return the record of the last selection layer before this one."""
        earlier = [number for number in self.records if number < layer]
        return self.records[max(earlier)] if earlier else None

    def kept_before(self, layer: float = float("inf")) -> torch.Tensor | None:
        """Return the units kept before a layer, by default at the end; `None` if none was dropped."""
        record = self.record_before(layer)
        return None if record is None else record.kept

    def counts_before(self, layer: float = float("inf")) -> list[int]:
        """Return the number of these units of each image in a packed sequence."""
        record = self.record_before(layer)
        return self.num_units if record is None else record.num_kept

    def units_by_image(self, units: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """Split units of a packed sequence, `counts` by image, and return their row-major numbers in each image."""
        if self.unit_order is not None:
            units = self.unit_order[units]
        starts = accumulate(self.num_units, initial=0)
        return [units_of_image - start for units_of_image, start in zip(units.split(counts), starts)]


class SelectionLayer(ModuleWrapper):
    """
    Pre-norm layer with patch selection between attention and MLP (paper, section 3.2), for images with the same number
    of patches: `(num_images, seq_length, hidden_size)`.

    Attention is the model's own module and kernel. It does not return scores, so one query is compared with the
    candidates a second time.

    Subclasses name the parts of the model's layer: `norms`, `projections` and `attend`, and `feed_forward` if it has
    more than a norm and an MLP.
    """

    number: int
    selection: LayerSelection | None  # None: the layer only shortens its arguments
    fuse: bool  # the dropped patches become one token
    unit: int  # side of a unit in patches
    num_prefix_tokens: int  # leading [CLS] and registers, which are always kept
    has_class_token: bool  # token 0 is [CLS]
    takes_text: bool  # the caller may pass `text_embeds`
    needs_text: bool  # the caller must pass them
    # Names of the norms before attention and before the MLP.
    norms = ("norm1", "norm2")

    def normed_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the input of queries and keys: `(num_images, seq_length, hidden_size)`."""
        norm = getattr(self, self.norms[0])
        return norm(hidden_states)

    def projections(self) -> Projections:
        raise NotImplementedError

    def project_query(self, states: torch.Tensor) -> torch.Tensor:
        """Project `(num_images, hidden_size)` to `(num_images, num_heads, head_dim)`."""
        parts = self.projections()
        query = project_rows(parts.query, parts.query_rows, states)
        return query.unflatten(-1, (parts.num_heads, -1))

    def project_key(self, states: torch.Tensor) -> torch.Tensor:
        """Project `(num_images, n, hidden_size)` to `(num_images, num_heads, n, head_dim)`."""
        parts = self.projections()
        key = project_rows(parts.key, parts.key_rows, states)
        return key.unflatten(-1, (parts.num_heads, -1)).transpose(1, 2)

    # Whether keys are a linear map of the normed tokens, without a norm after it.
    keys_are_linear = True

    def attend(self, normed: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        raise NotImplementedError

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        norm = getattr(self, self.norms[1])
        hidden_states = norm(hidden_states)
        return self.mlp(hidden_states)

    def shorten_arguments(self, current: SelectionPass, kept: torch.Tensor, arguments: dict) -> dict:
        """Return further arguments of attention, with entries for the kept units only."""
        return arguments

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        selection_pass: SelectionPass | None = None,
        **kwargs,
    ) -> torch.Tensor:
        current = SelectionPass() if selection_pass is None else selection_pass
        kept = current.kept_before(self.number)
        if kept is not None:
            attention_mask = shorten_mask(attention_mask, kept, self.unit)
            kwargs = self.shorten_arguments(current, kept, kwargs)
        normed = self.normed_tokens(hidden_states)
        hidden_states = hidden_states + self.attend(normed, attention_mask, **kwargs)
        if self.selection is not None:
            query = current.query if text_embeds is None else self.query_of_text(normed, text_embeds)
            hidden_states = self.select(current, hidden_states, normed, query)
        return hidden_states + self.feed_forward(hidden_states)

    def select(
        self,
        current: SelectionPass,
        hidden_states: torch.Tensor,
        normed: torch.Tensor,
        query: torch.Tensor | None,
    ) -> torch.Tensor:
        """Reduce `(num_images, seq_length, hidden_size)` to prefix, kept units and, with `self.fuse`, fused token."""
        before = current.kept_before(self.number)
        is_whole = before is None
        is_image = shorten_mask(current.is_image, before, self.unit)
        scores = self.score_units(normed, query, is_image, is_whole)  # (num_images, num_candidates)
        positions = choose_tokens(scores, self.selection.keep_rate)
        num_candidates = scores.shape[1]
        if is_whole:
            candidates = torch.arange(num_candidates, device=scores.device).expand(scores.shape)
        else:
            num_fused = num_candidates - before.shape[1]
            candidates = nn.functional.pad(before, (0, num_fused), value=FUSED_TOKEN)
        kept = candidates.gather(1, positions)
        current.records[self.number] = LayerRecord(kept, candidates, scores)
        if self.unit == 1:
            return shorten_tokens(hidden_states, scores, positions, self.fuse)
        prefix, patches = hidden_states.tensor_split([self.num_prefix_tokens], dim=1)
        # One row per unit: the selection then drops all patches of a unit.
        units = to_units(patches, self.unit, is_whole).flatten(2)
        units = shorten_tokens(units, scores, positions, self.fuse)  # (num_images, num_kept, unit ** 2 * hidden_size)
        patches = units.unflatten(2, (self.unit**2, -1))
        return torch.cat([prefix, patches.flatten(1, 2)], dim=1)

    def attention_to_units(self, current: SelectionPass, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the scores of all units of the grid, `(num_images, num_units)`, 0 for those dropped before."""
        before = current.kept_before(self.number)
        is_image = shorten_mask(current.is_image, before, self.unit)
        normed = self.normed_tokens(hidden_states)
        scores = self.score_units(normed, None, is_image, is_whole=before is None)
        if before is None:
            return scores
        whole = scores.new_zeros(len(scores), current.grid_size)
        return whole.scatter(1, before, scores)

    def score_units(
        self,
        normed: torch.Tensor,
        query: torch.Tensor | None,
        is_image: torch.Tensor | None,
        is_whole: bool,
    ) -> torch.Tensor:
        """Score the candidates: `(num_images, num_candidates)`. Padding scores 0. `is_whole`: see `to_units`."""
        patches = normed[:, self.num_prefix_tokens :]
        if self.selection.guidance == "random":
            num_candidates = patches.shape[1] // self.unit**2
            scores = random_scores(len(normed), num_candidates, normed.device)
            if is_image is not None:
                has_image = to_units(is_image, self.unit, is_whole).any(dim=-1)
                scores = scores * has_image
            return scores
        guiding_query = self.guiding_query(normed, query, is_image)
        scores = self.score(guiding_query, patches)  # (num_images, num_patches)
        if is_image is not None:
            scores = scores * is_image
        return to_units(scores, self.unit, is_whole).sum(dim=-1)

    def query_of_text(self, normed: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor | None:
        """Return the query of the caller's text; `None` if the image scores here."""
        if not self.takes_text:
            raise ValueError(
                "Got `text_embeds`, but no selection layer is scored by the text. Apply patch selection with guidance "
                "'text'."
            )
        expected = (normed.shape[0], normed.shape[2])
        if text_embeds.shape != expected:
            raise ValueError(
                f"`text_embeds` must have shape {expected}, one vector per image with the width of the vision tower, "
                f"got {tuple(text_embeds.shape)}."
            )
        return self.project_query(text_embeds) if self.selection.guidance == "text" else None

    def guiding_query(
        self,
        normed: torch.Tensor,
        text_query: torch.Tensor | None,
        is_image: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the query that scores the patches: `(num_images, num_heads, head_dim)`."""
        if self.selection.guidance == "text" and text_query is not None:
            if len(text_query) != len(normed):
                raise ValueError(
                    f"`input_ids` must have placeholders for {len(normed)} images or tiles, got {len(text_query)}."
                )
            return text_query.to(normed.dtype)
        if self.needs_text:
            raise ValueError(
                "Guidance 'text' needs `text_embeds`, got None. Pass them to `get_image_features` or to the vision "
                "tower, or apply patch selection with guidance 'image'."
            )
        if self.has_class_token:
            return self.project_query(normed[:, 0])
        # Without a [CLS], use the mean of all queries, which is the query of the mean. VisionZip
        # (https://arxiv.org/abs/2412.04467) uses the mean attention of all tokens, which needs the full map.
        if is_image is None:
            return self.project_query(normed.mean(dim=1))
        weights = is_image.unsqueeze(-1).to(normed.dtype)
        total = (normed * weights).sum(dim=1)
        num_patches = weights.sum(dim=1).clamp(min=1)
        return self.project_query(total / num_patches)

    def score(self, query: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Score patches with states of shape `(num_images, num_patches, width)`: `(num_images, num_patches)`."""
        scaling = query.shape[-1] ** -0.5
        if self.keys_are_linear:
            parts = self.projections()
            if is_plain_linear(parts.key):
                key_weight = parts.key.weight[parts.key_rows]
                return score_states(query, states, key_weight, scaling)
        return score_tokens(query, self.project_key(states), scaling)

    def recorded(self, current: SelectionPass) -> TripsSelection:
        """Return the layer's selection in a pass, in units."""
        record = current.records[self.number]
        return TripsSelection(kept_indices=record.kept, scores=record.scores, candidate_indices=record.candidates)


def pad_units(units_of_images: list[torch.Tensor]) -> torch.Tensor:
    """Return the units of each image, `(num_units,)`, in rows of one length: -2 is padding."""
    return nn.utils.rnn.pad_sequence(units_of_images, batch_first=True, padding_value=NO_UNIT)


def selecting_layers(model: nn.Module) -> list[SelectionLayer]:
    """Return the selection layers of a model in order."""
    return [layer for layer in model.modules() if isinstance(layer, SelectionLayer) and layer.selection is not None]


def to_units(patches: torch.Tensor, unit: int, is_whole: bool) -> torch.Tensor:
    """
    Group patches by unit: `(num_images, num_patches, ...)` -> `(num_images, num_units, unit * unit, ...)`. A whole
    grid is row-major; patches kept by an earlier layer are already grouped.
    """
    if unit == 1 or not is_whole:
        return patches.unflatten(1, (-1, unit**2))
    side = round(patches.shape[1] ** 0.5) // unit
    grid = patches.unflatten(1, (side, unit, side, unit))
    grid = grid.transpose(2, 3)  # (num_images, side, side, unit, unit, ...)
    units = grid.flatten(3, 4)
    return units.flatten(1, 2)


def shorten_mask(mask: torch.Tensor | None, kept: torch.Tensor | None, unit: int) -> torch.Tensor | None:
    """Shorten a patch mask, `(num_images, length)` or `(num_images, 1, length, length)`, to the kept units."""
    if mask is None or kept is None:
        return mask
    num_patches = mask.shape[-1]
    row_major = torch.arange(num_patches, device=mask.device)
    patches_of_units = to_units(row_major[None], unit, is_whole=True)[0]  # (num_units, unit ** 2)
    patches = patches_of_units[kept].flatten(1)  # (num_images, num_kept_patches)
    if mask.dim() == 2:
        return mask.gather(1, patches)
    num_images = len(patches)
    _, num_heads, num_queries, _ = mask.shape
    mask = mask.expand(num_images, -1, -1, -1)
    keys = patches[:, None, None, :].expand(-1, num_heads, num_queries, -1)
    mask = mask.gather(3, keys)
    if num_queries == num_patches:
        queries = patches[:, None, :, None].expand(-1, num_heads, -1, mask.shape[3])
        mask = mask.gather(2, queries)
    return mask
