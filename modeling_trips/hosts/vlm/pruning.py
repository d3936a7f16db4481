"""
Selection of visual tokens between the vision tower and the language model.

Models of Transformers accept encoded images as `mm_encoder_outputs`. The image is encoded first, tokens are selected,
and the model gets them with a prompt that has as many placeholders. The model does not change.
"""

from bisect import bisect_right
from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate

import torch
from torch import nn

from ...patch_selection import GateSelector, gather_tokens
from ..layers import SelectionPass
from .families import Family, find_family
from .guide import TextGuide
from .scoring import Scorer
from .visual_tokens import ExitSelection, VisualTokens, text_after_images


def prune_inputs(
    model: nn.Module,
    inputs: Mapping,
    visual_tokens: int | None = None,
    keep_rate: float | None = None,
    scorer: str | Scorer = "prompt",
) -> dict:
    """
    Encode the images of a prompt and drop visual tokens, before `model(**inputs)` or `model.generate(**inputs)`.

    The model does not change, and gradients reach its tower. Rows that become shorter than others are padded, on the
    left unless the inputs are padded on the right.

    Args:
        model (`PreTrainedModel`): A generative model that [`apply_patch_selection`] supports, or one without its head.
            Other models that take `mm_encoder_outputs` and have one placeholder per visual token work, but are not
            tested.
        inputs (`Mapping`): Outputs of the processor, with `input_ids` of shape `(batch_size, length)` (or
            `inputs_embeds`), and `labels` of that shape for training. Prompts may have any number of images.
        visual_tokens (`int`, *optional*): Number of visual tokens to keep per image. Where images differ in size, one
            with fewer keeps all. In SmolVLM, Idefics3 and InternVL, which cut an image into tiles, it counts per tile.
        keep_rate (`float`, *optional*): Share of the visual tokens to keep per image, in (0, 1], instead of a number.
        scorer (`str` or `Callable`, *optional*, defaults to `"prompt"`): `"prompt"` (relevance to the prompt, with
            diversity), `"divprune"` (diversity), `"cdpruner"` (relevance to the prompt and diversity), `"vispruner"`
            (the tower's attention and diversity), `"random"`, `"pooling"`, or a function of the features, the prompt's
            embeddings (both with one row per image), their mask and the number to keep, which returns positions and
            features; if it has an argument `attention`, it also gets that of the tower. The prompt is the text after
            the last image, or all text if none follows, without labels, special tokens and what the processor writes
            around an image. Put images before the question: chat templates add text after an image, which then is the
            prompt.

    Returns:
        `dict`: The inputs with shorter sequences, and `mm_encoder_outputs` instead of the images. Inputs without
        images do not change.

    Raises:
        TypeError: The model is not supported or has no `attention` for the scorer, or `visual_tokens` is no integer.
        ValueError: The inputs have videos, images and placeholders do not match, `labels` cover the whole prompt, the
            scorer is unknown, or both a number and a rate are given or one of them is out of range.
    """
    family = find_family(model)
    if family is None:
        raise TypeError(f"`prune_inputs` does not support {type(model).__name__}, whose prompt has no visual tokens.")
    at_exit = ExitSelection(visual_tokens=visual_tokens, keep_rate=keep_rate, scorer=scorer)
    family.check_exit(at_exit)
    pruned, _, _ = prune(family, dict(inputs), at_exit)
    return pruned


def prune(
    family: Family,
    inputs: dict,
    at_exit: ExitSelection,
    in_tower: bool = False,
    guide: TextGuide | None = None,
    probe_share: float = 0.0,
) -> tuple[dict, list[torch.Tensor], SelectionPass | None]:
    """
    Apply the selections inside and after the tower. Return the inputs, the kept visual tokens per image, and the
    selections of the tower's layers. `probe_share` of the dropped units are kept, too, see `GateSelector`.
    """
    if inputs.get("pixel_values_videos") is not None:
        raise ValueError(
            "Patch selection does not support videos, got `pixel_values_videos`. Call the model without selection."
        )
    if inputs.get("pixel_values") is None:
        return inputs, [], None
    if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
        raise ValueError("`input_ids` or `inputs_embeds` are needed with `pixel_values`, got neither.")
    for name in ("pixel_values", "input_ids", "inputs_embeds"):
        if inputs.get(name) is not None and 0 in inputs[name].shape:
            raise ValueError(f"`{name}` must not be empty, got shape {tuple(inputs[name].shape)}.")
    prompts = Prompts(family, inputs)
    current = None
    if in_tower or at_exit.reads_attention:
        current = family.begin_pass(inputs)
        current.selects = in_tower
        current.selector = GateSelector(probe_share)
        current.wants_attention = at_exit.reads_attention
        if guide is not None:
            prompt, prompt_mask = prompts.text
            queries = guide(prompt, prompt_mask)  # (batch_size, num_heads, head_dim)
            current.query = queries[prompts.row_of_images()]  # (num_images, num_heads, head_dim)
    tokens = family.encode(inputs, current)
    rows = prompts.row_of_groups(tokens.sizes)
    tokens = tokens.select(at_exit, rows=rows, text=lambda: prompts.text)
    pruned = prompts.prune(tokens, rows)
    pruned["mm_encoder_outputs"] = {"image": family.encoder_output(tokens)}
    return pruned, tokens.positions, current


class Prompts:
    """Token sequences of a batch, with the places of their visual tokens and of their text."""

    def __init__(self, family: Family, inputs: dict):
        self.family = family
        self.inputs = inputs
        self.embeddings = inputs.get("inputs_embeds")
        self.ids = inputs.get("input_ids")
        if self.ids is None:
            self.ids = self.is_token(family.image_token_id) * family.image_token_id
        self.is_visual = self.ids == family.image_token_id  # (batch_size, length)
        mask = inputs.get("attention_mask")
        self.mask = torch.ones_like(self.is_visual) if mask is None else mask.bool()
        self.is_text = self.mask & ~self.is_visual
        # The only host sync, before the tower runs.
        num_visual = self.is_visual.sum(dim=1)
        num_text = self.is_text.sum(dim=1)
        is_right_padded = ~self.mask[:, -1]
        counts = torch.stack([num_visual, num_text, is_right_padded])
        self.num_visual, self.num_text, is_right_padded = counts.tolist()
        self.pads_right = any(is_right_padded)

    def is_token(self, token_id: int) -> torch.Tensor:
        """Return a mask of the places of a token, `(batch_size, length)`, found by its embedding without ids."""
        if self.inputs.get("input_ids") is not None:
            return self.ids == token_id
        embed = self.family.model.get_input_embeddings()
        embedding = embed(torch.tensor(token_id, device=self.embeddings.device))
        return (self.embeddings == embedding).all(dim=-1)

    @cached_property
    def text(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Input embeddings of the text that scores, `(batch_size, length, width)`, and their mask. It is the text after
        the last image, or all text if none follows, without labels, special tokens and what the processor writes
        around an image.
        """
        is_text = self.is_text
        if self.inputs.get("labels") is not None:
            is_text = is_text & (self.inputs["labels"] == -100)
            has_prompt = is_text.any(dim=1) | ~self.is_visual.any(dim=1)
            if not has_prompt.all():
                raise ValueError("`labels` must be -100 on the prompt, but a row has labels on all of its text.")
        for token_id in self.family.special_token_ids:
            is_text = is_text & ~self.is_token(token_id)
        num_before, num_after = self.family.framing_tokens
        padded = nn.functional.pad(self.is_visual, (num_after, num_before))
        windows = padded.unfold(1, num_before + 1 + num_after, 1)  # (batch_size, length, window)
        is_framing = windows.any(dim=-1)
        is_text = text_after_images(self.is_visual, is_text & ~is_framing)
        order, mask = move_to_end(is_text, max(1, *self.num_text), at_start=True)
        if self.embeddings is not None:
            return gather_tokens(self.embeddings, order), mask
        ids = self.ids.masked_fill(self.is_visual, 0).gather(1, order)
        return self.family.model.get_input_embeddings()(ids), mask

    def row_of_groups(self, sizes: list[int]) -> list[int]:
        """Return the row of each group of visual tokens. Raise a ValueError if the placeholders do not match."""
        ends_of_rows = [*accumulate(self.num_visual)]
        rows = []
        ends_of_groups = {0}
        first = 0
        for size in sizes:
            rows.append(bisect_right(ends_of_rows, first) if size else 0)
            first += size
            ends_of_groups.add(first)
        if sum(sizes) != sum(self.num_visual) or not {*ends_of_rows} <= ends_of_groups:
            raise ValueError(
                f"`input_ids` must have one placeholder per visual token of each image, {sizes} by image, got "
                f"{self.num_visual} by row."
            )
        return rows

    def row_of_images(self) -> list[int]:
        """Return the row of each image (or tile) of the tower's batch, before the tower runs."""
        sizes = self.family.group_sizes(self.inputs, self.num_visual)
        num_images = self.family.images_per_group(self.inputs, sizes)
        rows = []
        for row, number in zip(self.row_of_groups(sizes), num_images):
            rows += [row] * number
        return rows

    def prune(self, tokens: VisualTokens, rows: list[int]) -> dict:
        """Return the inputs without the images and the dropped tokens; `rows` are those of the groups of tokens."""
        firsts = accumulate(tokens.sizes, initial=0)
        kept = [first + positions for first, positions in zip(firsts, tokens.positions)]
        kept = torch.cat(kept).to(self.ids.device)
        is_kept_visual = self.mask.new_zeros(sum(tokens.sizes))
        is_kept_visual = is_kept_visual.index_fill(0, kept, True)
        lengths = list(self.num_text)
        for positions, row in zip(tokens.positions, rows):
            lengths[row] += len(positions)
        is_kept = self.mask.masked_scatter(self.is_visual, is_kept_visual)
        order, mask = move_to_end(is_kept, max(lengths), at_start=self.pads_right)

        padding_id = self.family.config.get_text_config().pad_token_id
        if padding_id in (None, self.family.image_token_id):
            padding_id = 0
        padding = {"input_ids": padding_id, "labels": -100}
        pruned = {}
        for name, value in self.inputs.items():
            if name in self.family.encoder_arguments:
                continue
            if isinstance(value, torch.Tensor) and value.shape[:2] == self.ids.shape:
                if value.dim() == 3:  # `inputs_embeds`
                    value = gather_tokens(value, order).masked_fill(~mask.unsqueeze(-1), 0.0)
                else:
                    value = value.gather(1, order).masked_fill(~mask, padding.get(name, 0))
            pruned[name] = value
        if len({*lengths}) > 1:
            pruned["attention_mask"] = mask.to(self.ids.dtype)
        position_ids = self.prune_positions(order, mask)
        if position_ids is not None:
            pruned["position_ids"] = position_ids
        return pruned

    def prune_positions(self, order: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """
        Return position ids without gaps, which models read as packed sequences; `None` where the model makes them.
        Spatial positions keep their values and follow a row of consecutive positions; where the model goes on counting
        after this prompt is set on the model.
        """
        spatial = self.family.position_ids({**self.inputs, "input_ids": self.ids})
        if spatial is None and self.inputs.get("position_ids") is None:
            return None
        num_tokens = mask.long().cumsum(dim=1)  # (batch_size, length)
        consecutive = (num_tokens - 1).clamp(min=0)
        if spatial is None:
            return consecutive
        spatial = spatial.gather(2, order.expand(len(spatial), -1, -1))  # (3, batch_size, length)
        if hasattr(self.family.base, "rope_deltas"):
            last = spatial.masked_fill(~mask, -1).amax(dim=(0, 2))
            num_ahead = last + 1 - mask.sum(dim=1)
            self.family.base.rope_deltas = num_ahead.unsqueeze(1)
        return torch.cat([consecutive[None], spatial])


def move_to_end(is_kept: torch.Tensor, length: int, at_start: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the positions that move each row's kept tokens to its end (or start) in order, `(batch_size, length)`, and a
    mask of the kept tokens there.
    """
    is_at_end = is_kept ^ at_start
    order = is_at_end.to(torch.int8).argsort(dim=1, stable=True)
    order = order[:, :length] if at_start else order[:, -length:]
    return order, is_kept.gather(1, order)
