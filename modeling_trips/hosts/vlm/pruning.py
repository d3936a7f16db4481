"""
Selection of visual tokens between the vision tower and the language model.

Models of Transformers accept encoded images as `mm_encoder_outputs`. The image is encoded first, tokens are selected,
and the model gets them with a prompt that has as many placeholders. Its modules and weights do not change. A model
with positions in the image (Qwen-VL) also keeps the `rope_deltas` of the shorter prompt, as after its own forward
pass: `generate` reads there where positions go on.
"""

from bisect import bisect_right
from collections.abc import Mapping
from functools import cached_property
from itertools import accumulate

import torch
from torch import nn

from ...patch_selection import gather_tokens
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
    scorer: str | Scorer = "divprune",
) -> dict:
    """
    Encode the images of a prompt and drop visual tokens, before `model(**inputs)` or `model.generate(**inputs)`.

    The model's modules and weights do not change, and gradients reach its tower. In Qwen-VL, its `rope_deltas` become
    those of this prompt: run or generate it before you prune another one. Rows that become shorter than others are
    padded, on the left unless the inputs are padded on the right.

    Args:
        model (`PreTrainedModel`): A generative model that [`apply_patch_selection`] supports, or one without its head.
            Other models that take `mm_encoder_outputs` and have one placeholder per visual token work, but are not
            tested.
        inputs (`Mapping`): Outputs of the processor, with `input_ids` of shape `(batch_size, length)` (or
            `inputs_embeds`), and `labels` of that shape for training. Prompts may have any number of images.
        visual_tokens (`int`, *optional*): Number of visual tokens to keep per image. Where images differ in size, one
            with fewer keeps all. In SmolVLM, Idefics3 and InternVL, which cut an image into tiles, it counts per tile.
            In videos with a `video_grid_thw` it counts per time step; other videos stay whole.
        keep_rate (`float`, *optional*): Share of the visual tokens to keep per image, in (0, 1], instead of a number.
        scorer (`str` or `Callable`, *optional*, defaults to `"divprune"`): `"divprune"` (diversity), `"prompt"`
            (relevance to the prompt, with diversity), `"cdpruner"` (relevance to the prompt and diversity),
            `"vispruner"` (the tower's attention and diversity), `"visionzip"` (the tower's attention, and merged
            tokens), `"random"`, `"pooling"`, `"evs"` (what changes in a video; images stay whole), or a function of
            the features, the prompt's embeddings (both with one row per image), their mask and the number to keep,
            which returns positions and features; if it has an argument `attention`, it also gets that of the tower.
            The prompt is the text after the last image, or all text if none follows, without labels, special tokens
            and what the processor writes around an image. A scorer that reads it needs the images before the
            question: chat templates add text after an image, which then is the prompt.

    Returns:
        `dict`: The inputs with shorter sequences, and `mm_encoder_outputs` instead of images and videos. Inputs
        without these do not change.

    Raises:
        TypeError: The model is not supported or has no `attention` for the scorer, or `visual_tokens` is no integer.
        ValueError: Images or videos and placeholders do not match, a time step of a video would keep no token,
            `labels` cover the whole prompt, the scorer is unknown or does not choose in videos, a function as scorer
            returns other positions than so many of the features', each once, or not exactly one of number and rate is
            given or it is out of range.
    """
    family = find_family(model)
    if family is None:
        raise TypeError(f"`prune_inputs` does not support {type(model).__name__}, whose prompt has no visual tokens.")
    at_exit = ExitSelection(
        visual_tokens=visual_tokens,
        keep_rate=keep_rate,
        scorer=scorer,
    )
    if at_exit.keeps_all:
        raise ValueError("`prune_inputs` needs `visual_tokens` or `keep_rate`.")
    family.check_exit(at_exit)
    pruned, _, _ = select_visual_tokens(family, dict(inputs), at_exit)
    return pruned


def select_visual_tokens(
    family: Family,
    inputs: dict,
    at_exit: ExitSelection,
    in_tower: bool = False,
    guide: TextGuide | None = None,
) -> tuple[dict, list[torch.Tensor], SelectionPass | None]:
    """
    Apply the selections inside and after the tower. Return the inputs, the kept visual tokens per image, and the
    selections of the tower's layers.
    """
    has_images = inputs.get("pixel_values") is not None
    has_videos = inputs.get("pixel_values_videos") is not None
    if not has_images and not has_videos:
        return inputs, [], None
    if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
        raise ValueError("`input_ids` or `inputs_embeds` are needed with images or videos, got neither.")
    for name in ("pixel_values", "pixel_values_videos", "input_ids", "inputs_embeds"):
        if inputs.get(name) is not None and 0 in inputs[name].shape:
            raise ValueError(f"`{name}` must not be empty, got shape {tuple(inputs[name].shape)}.")
    prompts = Prompts(family, inputs)
    current = None
    kept = {}
    if has_images:
        if in_tower or at_exit.reads_attention:
            current = family.begin_pass(inputs)
            current.selects = in_tower
            current.wants_attention = at_exit.reads_attention
            if guide is not None:
                prompt, prompt_mask = prompts.text
                guide.to(prompt.device)  # the model may have moved since it was patched
                queries = guide(prompt, prompt_mask)  # (batch_size, num_heads, head_dim)
                current.query = queries[prompts.row_of_images()]  # (num_images, num_heads, head_dim)
        tokens = family.encode(inputs, current)
        rows = prompts.rows_of(tokens.sizes)
        kept["image"] = tokens.select(at_exit, rows=rows, text=lambda: prompts.text)
    if has_videos:
        tokens, steps = family.encode_videos(inputs)
        rows = prompts.rows_of(tokens.sizes, "video")
        if inputs.get("video_grid_thw") is not None:  # others stay whole: their steps are not known
            tokens = tokens.select_steps(at_exit, steps, rows=rows, text=lambda: prompts.text)
        kept["video"] = tokens.joined(steps)
    pruned = prompts.without_dropped(kept)
    pruned["mm_encoder_outputs"] = {kind: family.encoder_output(tokens) for kind, tokens in kept.items()}
    positions = [group for tokens in kept.values() for group in tokens.positions]
    return pruned, positions, current


class Prompts:
    """Token sequences of a batch, with the places of their visual tokens and of their text."""

    def __init__(self, family: Family, inputs: dict):
        self.family = family
        self.inputs = inputs
        self.embeddings = inputs.get("inputs_embeds")
        self.ids = inputs.get("input_ids")
        token_ids = {"image": family.image_token_id}
        if inputs.get("pixel_values_videos") is not None and family.video_token_id is not None:
            token_ids["video"] = family.video_token_id
        # Places of the visual tokens of images, and of videos if there are any: `(batch_size, length)`.
        self.places = {kind: self.is_token(token_id) for kind, token_id in token_ids.items()}
        if self.ids is None:
            self.ids = sum(self.places[kind] * token_id for kind, token_id in token_ids.items())
        self.is_visual = torch.stack([*self.places.values()]).any(dim=0)
        mask = inputs.get("attention_mask")
        self.mask = torch.ones_like(self.is_visual) if mask is None else mask.bool()
        self.is_text = self.mask & ~self.is_visual
        # What the lengths of the new rows depend on comes to the host at once, before the tower runs. Later syncs are
        # the check of `labels`, and sizes of images in families whose images have any size.
        ends_in_padding = ~self.mask[:, -1]
        counted = [ends_in_padding, self.is_text.sum(dim=1)]
        for is_kind in self.places.values():
            counted.append(is_kind.sum(dim=1))
        counts = torch.stack(counted)  # (2 + number of kinds, batch_size)
        ends_in_padding, self.num_text, *num_visual = counts.tolist()
        self.pads_right = any(ends_in_padding)
        self.num_visual: dict[str, list[int]] = dict(zip(self.places, num_visual))

    def is_token(self, token_id: int) -> torch.Tensor:
        """Return a mask of the places of a token, `(batch_size, length)`, found by its embedding without ids."""
        if self.inputs.get("input_ids") is not None:
            return self.ids == token_id
        embed = self.family.model.get_input_embeddings()
        embedding = embed(torch.tensor(token_id, device=self.embeddings.device))  # (hidden_size,)
        is_equal = self.embeddings == embedding  # (batch_size, length, hidden_size)
        return is_equal.all(dim=-1)

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
        is_text = is_text & ~framed_images(self.is_visual, num_before, num_after)
        is_text = text_after_images(self.is_visual, is_text)
        longest = max(1, *self.num_text)
        order, mask = move_kept(is_text, longest, to_start=True)
        if self.embeddings is not None:
            return gather_tokens(self.embeddings, order), mask
        ids = self.ids.masked_fill(self.is_visual, 0)  # a placeholder may have no embedding
        embed = self.family.model.get_input_embeddings()
        return embed(ids.gather(1, order)), mask

    def rows_of(self, sizes: list[int], kind: str = "image") -> list[int]:
        """
        Return the row of each group of visual tokens, images or parts of videos. Raise a ValueError if the
        placeholders do not match.

        Two rows with 5 and 4 visual tokens have the visual tokens 0 to 4 and 5 to 8 of the batch. Groups of sizes
        `[3, 2, 4]` begin with the visual tokens 0, 3 and 5, so they are in the rows `[0, 0, 1]`.
        """
        num_visual = self.num_visual.get(kind, [0] * len(self.ids))
        ends_of_rows = [*accumulate(num_visual)]
        rows = []
        ends_of_groups = {0}
        first = 0
        for size in sizes:
            row = bisect_right(ends_of_rows, first) if size > 0 else 0
            rows.append(row)
            first += size
            ends_of_groups.add(first)
        if sum(sizes) != sum(num_visual) or not {*ends_of_rows} <= ends_of_groups:
            raise ValueError(
                f"`input_ids` must have one placeholder per visual token of each {kind}, {sizes} by {kind}, got "
                f"{num_visual} by row."
            )
        return rows

    def row_of_images(self) -> list[int]:
        """Return the row of each image (or tile) of the tower's batch, before the tower runs."""
        sizes = self.family.group_sizes(self.inputs, self.num_visual["image"])
        num_images = self.family.images_per_group(self.inputs, sizes)
        rows = []
        for row, number in zip(self.rows_of(sizes), num_images):
            rows += [row] * number
        return rows

    def without_dropped(self, kept: dict[str, VisualTokens]) -> dict:
        """
        Return the inputs without the images, the videos and the dropped tokens.

        With V for a visual token, the rows `[a V V V b]` and `[c V V d e]` have groups of sizes `[3, 2]`, the visual
        tokens 0 to 2 and 3 to 4 of the batch. If the positions `[0, 2]` of the first group and `[1]` of the second are
        kept, these are the visual tokens 0, 2 and 4, and the rows become `[a V V b]` and `[c V d e]`.
        """
        is_kept = self.mask  # (batch_size, length)
        lengths = list(self.num_text)
        for kind, tokens in kept.items():
            is_kept = self.drop(is_kept, tokens, self.places[kind])
            for positions, row in zip(tokens.positions, self.rows_of(tokens.sizes, kind)):
                lengths[row] += len(positions)
        encoded = {name for kind in kept for name in self.family.encoder_arguments[kind]}
        # Rows that become shorter than others are padded: `mask` is False there.
        order, mask = move_kept(is_kept, max(lengths), to_start=self.pads_right)  # (batch_size, new_length)
        pruned = {}
        for name, value in self.inputs.items():
            if name in encoded:
                continue
            if isinstance(value, torch.Tensor) and value.shape[:2] == self.ids.shape:
                value = self.shorten(name, value, order, mask)
            pruned[name] = value
        if len({*lengths}) > 1:
            pruned["attention_mask"] = mask.to(self.ids.dtype)

        spatial = self.spatial_positions(order)
        if spatial is not None:
            self.continue_positions(spatial, mask)
            # A row of positions without gaps comes first: models read a gap as the start of another, packed sequence.
            positions = torch.cat([consecutive_positions(mask)[None], spatial])  # (4, batch_size, new_length)
            pruned["position_ids"] = positions
        elif self.inputs.get("position_ids") is not None:
            pruned["position_ids"] = consecutive_positions(mask)
        return pruned

    def drop(self, is_kept: torch.Tensor, tokens: VisualTokens, places: torch.Tensor) -> torch.Tensor:
        """Return the mask `is_kept`, `(batch_size, length)`, with only the kept visual tokens at these places."""
        starts = accumulate(tokens.sizes, initial=0)
        kept = [start + positions for positions, start in zip(tokens.positions, starts)]
        kept = torch.cat(kept).to(self.ids.device)  # (num_kept,), among the visual tokens of the batch
        is_kept_visual = self.mask.new_zeros(sum(tokens.sizes))  # (num_visual,)
        is_kept_visual = is_kept_visual.index_fill(0, kept, True)
        return is_kept.masked_scatter(places, is_kept_visual)

    def shorten(self, name: str, value: torch.Tensor, order: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return an input with one value per token for the new rows, `(batch_size, new_length, ...)`, padded."""
        if value.dim() == 3:  # `inputs_embeds`
            return gather_tokens(value, order).masked_fill(~mask.unsqueeze(-1), 0.0)
        padding = 0
        if name == "labels":
            padding = -100
        elif name == "input_ids":
            pad_token_id = getattr(self.family.config.get_text_config(), "pad_token_id", None)
            if pad_token_id not in (None, self.family.image_token_id):
                padding = pad_token_id
        return value.gather(1, order).masked_fill(~mask, padding)

    def spatial_positions(self, order: torch.Tensor) -> torch.Tensor | None:
        """
        Return the position ids of the new rows in a family with positions in the image, `(3, batch_size, new_length)`.
        Tokens keep those of the whole prompt. `None` in other families.
        """
        positions = self.family.position_ids({**self.inputs, "input_ids": self.ids})  # (3, batch_size, length)
        if positions is None:
            return None
        return positions.gather(2, order.expand(len(positions), -1, -1))

    def continue_positions(self, spatial: torch.Tensor, mask: torch.Tensor):
        """
        Set on the model how far the positions of each row are ahead of its length, as its own forward pass does with
        a whole prompt: new tokens go on behind the largest position.
        """
        largest = spatial.masked_fill(~mask, -1).amax(dim=(0, 2))  # (batch_size,)
        num_ahead = largest + 1 - mask.sum(dim=1)
        self.family.base.rope_deltas = num_ahead.unsqueeze(1)


def framed_images(is_visual: torch.Tensor, num_before: int, num_after: int) -> torch.Tensor:
    """
    Return a mask of the images with the tokens that frame them: visual tokens, the `num_before` tokens before an image
    and the `num_after` tokens behind it. Masks have shape `(batch_size, length)`.

    With 2 tokens before and 1 behind, and V for a visual token:

        tokens      a  <f>  <g>  V  V  <f>  b
        is_visual   0   0    0   1  1   0   0
        result      0   1    1   1  1   1   0

    A token is in the result if the window around it, from `num_after` tokens before to `num_before` tokens behind it,
    has a visual token: that of `b` is `<f> b` and what follows.
    """
    padded = nn.functional.pad(is_visual, (num_after, num_before))  # windows reach beyond both ends
    windows = padded.unfold(1, num_after + 1 + num_before, 1)  # (batch_size, length, window)
    return windows.any(dim=-1)


def consecutive_positions(mask: torch.Tensor) -> torch.Tensor:
    """Return position ids that count the tokens of each row, 0 before the first: `[0, 1, 1]` gives `[0, 0, 1]`."""
    num_tokens = mask.long().cumsum(dim=1)  # (batch_size, length)
    return (num_tokens - 1).clamp(min=0)


def move_kept(is_kept: torch.Tensor, length: int, to_start: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the positions that move each row's kept tokens in order to the end (or start) of a row of `length` tokens,
    `(batch_size, length)`, and a mask of the kept tokens there.

    A row `[1, 0, 1, 1, 0]` gives, at the end of 4 tokens, the positions `[4, 0, 2, 3]` and the mask `[0, 1, 1, 1]`.
    """
    is_last = is_kept ^ to_start  # the kept tokens, or the others
    order = is_last.to(torch.int8).argsort(dim=1, stable=True)
    order = order[:, :length] if to_start else order[:, -length:]
    return order, is_kept.gather(1, order)
