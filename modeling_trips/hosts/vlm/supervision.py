"""
Selection supervision of a text guide on a frozen model.

`selection_loss` of [`modeling_trips.modeling_trips`] compares the scores of `guided_selection` with targets. Targets
come from regions of the data, or from the attention of the unpruned model's answer. `answer_losses` needs no targets:
the gate of [`modeling_trips.patch_selection.attend`] gives the scores a gradient of the answer's loss.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import PIL.Image
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...modeling_trips_vision import TripsSelection
from ...patch_selection import KeyInfo, attend, choose_tokens
from ..apply import record_patch_selection
from ..layers import SelectionPass, selecting_layers
from .families import Family, LlavaNext, find_family
from .pruning import Prompts, consecutive_positions, prune
from .tower import CURRENT_PASS, selecting
from .visual_tokens import ExitSelection
from .wrapper import selection_of


def guided_selection(model: PreTrainedModel, inputs: Mapping) -> TripsSelection:
    """
    Return the selection of the guide's layer for prompts with images, without answers. The language model does not
    run. `scores` and `candidate_indices` have shape `(num_images, num_units)`, and scores carry gradients to the
    guide. Tiles count as images. Raise a ValueError if no layer of the model is scored by the text.
    """
    guidances = [layer.selection.guidance for layer in selecting_layers(model)]
    if "text" not in guidances:
        raise ValueError(f"No layer of this {type(model).__name__} is scored by the text. Pass a `guide`.")
    with record_patch_selection(model) as selections:
        selection_of(model).prune(dict(inputs))
    return selections[guidances.index("text")]


def region_masks(
    images: Sequence[PIL.Image.Image],
    regions: Sequence[Sequence[float] | None],
) -> list[PIL.Image.Image]:
    """
    Paint each region white on a black image of the same size. The processor transforms these masks like the images
    (resize, crop, pad, tiles), so they show which patches see the region. A region is (x0, y0, x1, y1) in pixels, x1
    and y1 exclusive; `None` if unknown.
    """
    masks = []
    for image, region in zip(images, regions):
        mask = PIL.Image.new("RGB", image.size)
        if region is not None:
            x0, y0, x1, y1 = (round(edge) for edge in region)
            x1 = max(x1, x0 + 1)  # at least one pixel
            y1 = max(y1, y0 + 1)
            mask.paste((255, 255, 255), (x0, y0, x1, y1))
        masks.append(mask)
    return masks


def rows_of_images(model: PreTrainedModel, inputs: Mapping) -> list[int]:
    """Return the row of `inputs`, which are outputs of the processor, of each image. Tiles count as images."""
    return Prompts(find_family(model), dict(inputs)).row_of_images()


def targets_of_masks(model: PreTrainedModel, masks: Mapping, blanks: Mapping) -> torch.Tensor:
    """
    Return the share of each region in the units of patches that become one visual token, `(num_images, num_units)`.
    Each row sums to 1, or to 0 without a region. Tiles count as images; units of packed images are padded with zeros.
    `masks` are the processor's outputs for `region_masks` and the prompts, `blanks` those for black images.
    """
    family = find_family(model)
    shown = masks["pixel_values"] - blanks["pixel_values"]
    shown = shown.float().clamp(min=0)
    is_visual = masks["input_ids"] == family.image_token_id
    num_visual = is_visual.sum(dim=1).tolist()
    if shown.dim() == 2:  # packed: a row is a patch
        areas = shown.mean(dim=-1)  # (num_patches,)
        areas = areas.unflatten(0, (-1, family.unit**2))
        areas = areas.mean(dim=-1)  # (num_units,)
        areas = areas.split(family.group_sizes(masks, num_visual))
        areas = nn.utils.rnn.pad_sequence(areas, batch_first=True)  # (num_images, num_units)
    else:
        if shown.dim() == 5:
            counts = family.tiles_per_entry(masks, num_visual)
            shown = torch.cat([tiles[:count] for tiles, count in zip(shown, counts)])
        patch_size = family.config.vision_config.patch_size
        if not isinstance(patch_size, int):
            patch_size, _ = patch_size
        shown = shown.mean(dim=1)  # (num_images, height, width)
        areas = nn.functional.avg_pool2d(shown, patch_size * family.unit).flatten(1)
    return areas / areas.sum(dim=-1, keepdim=True).clamp(min=1e-6)


@torch.enable_grad()
def targets_of_relevance(model: PreTrainedModel, inputs: Mapping, num_answer_tokens: Sequence[int]) -> torch.Tensor:
    """
    Return the share of each unit of patches in what the image takes off the loss of its answer, `(num_images,
    num_units)`: -g . h for the embedding h of a visual token as it enters the language model and the gradient g of the
    answer's cross-entropy, 0 where that is negative (as in [`RelevanceGradient`]). Nothing is pruned. Each row sums to
    1, or to 0 where no token is relevant. Tiles count as images; units of packed images are padded with zeros.

    Prompts end with their answers, of `num_answer_tokens` by row, and are padded on the left.
    """
    family = find_family(model)
    with torch.no_grad():
        whole, _, _ = prune(family, dict(inputs), ExitSelection())  # encoded, and all tokens kept
    encoded = whole["mm_encoder_outputs"]["image"]
    groups = [group.detach().requires_grad_() for group in encoded.pooler_output]
    is_batch = isinstance(encoded.pooler_output, torch.Tensor)
    encoded.pooler_output = torch.stack(groups) if is_batch else groups

    longest = max(num_answer_tokens)
    answers = inputs["input_ids"][:, -longest:]
    counts = torch.tensor(num_answer_tokens, device=answers.device)
    places_from_end = torch.arange(longest, 0, -1, device=answers.device)
    is_answer = places_from_end <= counts[:, None]  # (batch_size, longest)
    logits = model(**whole, use_cache=False, logits_to_keep=longest + 1).logits
    logits = logits[:, :-1].float().transpose(1, 2)  # (batch_size, vocab_size, longest)
    losses = nn.functional.cross_entropy(logits, answers, reduction="none")
    losses = (losses * is_answer).sum(dim=1) / counts  # (batch_size,)
    gradients = torch.autograd.grad(losses.sum(), groups)
    relevance = []
    for group, gradient in zip(groups, gradients):
        products = gradient.float() * group.detach().float()
        relevance.append(-products.sum(dim=-1).clamp(max=0))  # (num_tokens,)
    relevance = family.to_units(relevance, inputs)
    targets = nn.utils.rnn.pad_sequence(relevance, batch_first=True)
    total = targets.sum(dim=-1, keepdim=True)
    return targets / total.clamp(min=torch.finfo(total.dtype).tiny)


@torch.no_grad()
def targets_of_attention(model: PreTrainedModel, inputs: Mapping, num_answer_tokens: Sequence[int]) -> torch.Tensor:
    """
    Return the attention from the unpruned model's answer to each visual token, `(num_images, num_units)`: the mean
    over layers, heads and the tokens that predict the answer. Only these rows are computed, not the map. Each row sums
    to 1. Tiles count as images; units of packed images are padded with zeros.

    Prompts end with their answers, of `num_answer_tokens` by row, and are padded on the left. Raise a ValueError if
    the model has a selection, or its visual tokens are not the units of its tower.
    """
    family = find_family(model)
    if selection_of(model) is not None:
        raise ValueError("The model must be unpruned, got one with selection. Call `remove_patch_selection` first.")
    if isinstance(family, LlavaNext):
        raise ValueError(
            f"Attention targets are not supported for {type(model).__name__}, which repacks its visual tokens. Use "
            "regions."
        )
    ids = inputs["input_ids"]
    # Row r of the attention predicts token r + 1.
    last = ids.shape[1] - 1
    rows = torch.arange(last - max(num_answer_tokens), last, device=ids.device)
    counts = torch.tensor(num_answer_tokens, device=ids.device)
    is_answer = rows >= last - counts[:, None]  # (batch_size, num_rows)
    recorded: list[torch.Tensor] = []

    def attend_and_record(module: nn.Module, query, key, value, attention_mask, scaling, **kwargs):
        num_groups = query.shape[1] // key.shape[1]  # of query heads that share a head of keys
        keys = key.repeat_interleave(num_groups, dim=1).float()
        queries = query[:, :, rows].float()  # (batch_size, num_heads, num_rows, head_dim)
        logits = queries @ keys.transpose(2, 3)
        logits = logits * scaling
        is_hidden = ~attention_mask[:, :, rows]
        lowest = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(is_hidden, lowest)
        weights = logits.softmax(dim=-1)
        weights = weights.mean(dim=1)  # (batch_size, num_rows, length)
        weights = weights * is_answer.unsqueeze(-1)
        num_answers = is_answer.sum(dim=1, keepdim=True)
        recorded.append(weights.sum(dim=1) / num_answers)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    with _attention("trips_answer_rows", attend_and_record, model.get_decoder()):
        model.base_model(**inputs, use_cache=False)
    attention = torch.stack(recorded).mean(dim=0)  # (batch_size, length)
    is_visual = ids == family.image_token_id
    num_visual = is_visual.sum(dim=1).tolist()
    sizes = family.group_sizes(inputs, num_visual)
    groups = attention[is_visual].split(sizes)
    targets = nn.utils.rnn.pad_sequence(groups, batch_first=True)
    return targets / targets.sum(dim=-1, keepdim=True).clamp(min=1e-6)


def answer_losses(
    model: PreTrainedModel,
    inputs: Mapping,
    num_answer_tokens: Sequence[int],
    probe_share: float = 0.0,
) -> tuple[torch.Tensor, TripsSelection]:
    """
    Return the mean cross-entropy of each row's answer tokens, `(batch_size,)`, and the selection of the guide's layer.

    The values are those of the pruned model. With `probe_share`, in [0, 1], a random sample of the dropped units
    runs through the rest of the tower and the language model. No token attends to them, but the losses have a gradient
    to the scores of the units that run: see [`attend`]. Inputs are as in [`targets_of_attention`].

    Raises:
        TypeError: `probe_share` is not 0, and the gate is not supported for the model.
        ValueError: The guide's layer is not the only selection, or drops nothing that `probe_share` could run.
    """
    family = find_family(model)
    selection = selection_of(model)
    # A window of the language model would count the probed tokens.
    has_window = getattr(family.config.get_text_config(), "sliding_window", None) is not None
    if probe_share > 0 and (has_window or not family.has_gate):
        raise TypeError(f"Learning from answers is not supported for {type(model).__name__}. Use another teacher.")
    is_guided = selection is not None and selection.guide is not None
    if not is_guided or len(selection.schedule.layers) > 1 or selection.at_exit != ExitSelection():
        raise ValueError("The layer of a `guide` must be the only selection. Apply patch selection with it alone.")
    ids = inputs["input_ids"]
    longest = max(num_answer_tokens)
    counts = torch.tensor(num_answer_tokens, device=ids.device)
    places_from_end = torch.arange(ids.shape[1], 0, -1, device=ids.device)
    is_prompt = places_from_end > counts[:, None]
    inputs = {**inputs, "labels": ids.masked_fill(is_prompt, -100)}
    gated = [family.tower, model.get_decoder()] if probe_share > 0 else []
    with _attention("trips_gate", _attend_gated, *gated):
        pruned, _, current = prune(
            family,
            inputs,
            selection.at_exit,
            in_tower=True,
            guide=selection.guide,
            probe_share=probe_share,
        )
        labels = pruned.pop("labels")[:, -longest:]
        if current.key_info.gate is not None:
            _gate_prompt(family, pruned, current)
        elif gated:
            raise ValueError(f"A layer that learns must drop patches, got {selection.schedule}. Lower its keep rate.")
        with selecting(current):
            logits = model(**pruned, use_cache=False, logits_to_keep=longest + 1).logits
    logits = logits[:, :-1].float().transpose(1, 2)  # (batch_size, vocab_size, longest)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    (layer,) = selecting_layers(model)
    recorded = layer.recorded(current)
    if current.key_info.gate is not None:  # not all units that ran
        recorded.kept_indices = choose_tokens(recorded.scores, layer.selection.keep_rate).kept
    return losses.sum(dim=1) / counts, recorded


def _gate_prompt(family: Family, pruned: dict, current: SelectionPass):
    """Give the tokens of the prompt the gate of the tower's, and positions that do not count the probed ones."""
    ids = pruned["input_ids"]
    key_info = current.key_info
    is_visual = ids == family.image_token_id
    num_images, num_units = current.kept_before().shape
    num_visual = int(is_visual.sum()) // num_images
    num_others = num_visual - num_units  # LLaVA may pass the tower's [CLS]
    unit_size = family.unit**2

    def prompt_values(values_of_patches: torch.Tensor, value_of_others: float) -> torch.Tensor:
        values_of_patches = values_of_patches[:, -num_units * unit_size :]  # without the prefix
        values_of_units = values_of_patches[:, ::unit_size]  # (num_images, num_units)
        values = nn.functional.pad(values_of_units, (num_others, 0), value=value_of_others)
        return values.new_full(ids.shape, value_of_others).masked_scatter(is_visual, values)

    is_probed = prompt_values(key_info.is_probed, False)
    current.key_info = KeyInfo(gate=prompt_values(key_info.gate, 1.0), is_probed=is_probed)
    mask = pruned.setdefault("attention_mask", torch.ones_like(ids))
    pruned["position_ids"] = consecutive_positions(mask * ~is_probed)


@contextmanager
def _attention(name: str, function: Callable, *modules: PreTrainedModel) -> Iterator[None]:
    """Let modules use an attention function, which gets masks as for SDPA and every causal one."""
    own = [module.config._attn_implementation for module in modules]
    ALL_ATTENTION_FUNCTIONS.register(name, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, _causal_mask)
    try:
        for module in modules:
            module.set_attn_implementation(name)
        yield
    finally:
        for module, implementation in zip(modules, own):
            module.set_attn_implementation(implementation)


def _causal_mask(*args, **kwargs) -> torch.Tensor | None:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _attend_gated(module: nn.Module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Call SDPA on the keys of the pass."""
    current = CURRENT_PASS.get()
    key_info = KeyInfo() if current is None else current.key_info
    return attend(
        sdpa_attention_forward,
        module,
        query,
        key,
        value,
        key_info=key_info._replace(mask=attention_mask),
        scaling=scaling,
        **kwargs,
    )
