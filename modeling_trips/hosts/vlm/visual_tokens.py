"""
Visual tokens on their way from the vision tower to the language model.

The way is the same in Transformers and in vLLM: a family encodes images ([`Family.encode`]), where layers of the tower
may drop patches, and [`VisualTokens.select`] selects among the tokens that are left. A family or an engine differs
only in how it encodes.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...patch_selection import gather_tokens, num_kept_tokens
from .scoring import EVS, READ_PROMPT, SCORERS, Scorer, keep_changes, pooling_cells


@dataclass(frozen=True)
class ExitSelection:
    """Settings of the selection after the vision tower, as in [`prune_inputs`]."""

    visual_tokens: int | None = None
    keep_rate: float | None = None
    scorer: str | Scorer = "divprune"

    def __post_init__(self):
        if self.visual_tokens is not None:
            if self.keep_rate is not None:
                raise ValueError("Give `visual_tokens` or `keep_rate`, not both.")
            if type(self.visual_tokens) is not int:
                raise TypeError(f"`visual_tokens` must be an int, got {self.visual_tokens!r}.")
            if self.visual_tokens < 1:
                raise ValueError(f"`visual_tokens` must be at least 1, got {self.visual_tokens}.")
            if self.scorer == EVS:
                raise ValueError(f"`scorer='evs'` takes a `keep_rate`, got {self.visual_tokens} `visual_tokens`.")
        if self.keep_rate is not None:
            if type(self.keep_rate) not in (int, float):
                raise TypeError(f"`keep_rate` must be a number, got {self.keep_rate!r}.")
            if not 0 < self.keep_rate <= 1:
                raise ValueError(f"`keep_rate` must be in (0, 1], got {self.keep_rate}.")
        if not callable(self.scorer) and self.scorer not in (*SCORERS, EVS):
            raise ValueError(
                f"`scorer` must be a function or one of {', '.join(SCORERS)}, {EVS}, got {self.scorer!r}."
            )

    def check_fits(self, tokens_per_image: int | None, in_tower: bool = False):
        """
        Raise a ValueError if the selection does not fit images of `tokens_per_image` tokens (`None`: of any number),
        of which the tower drops some, too, if `in_tower`.
        """
        if self.visual_tokens is not None and tokens_per_image is not None and self.visual_tokens > tokens_per_image:
            raise ValueError(
                f"`visual_tokens` must be at most {tokens_per_image}, the tokens of an image (or tile), got "
                f"{self.visual_tokens}."
            )
        if self.scorer != "pooling" or self.keeps_all:
            return
        if in_tower:
            raise ValueError(
                "`scorer='pooling'` needs the whole grid of visual tokens, but layers of the tower drop some. "
                "Use another scorer, or the schedule 'unpruned'."
            )
        if tokens_per_image is not None:
            pooling_cells(tokens_per_image, self.num_kept(tokens_per_image, tokens_per_image))

    def num_kept(self, size: int, num_candidates: int) -> int:
        """Return the number of kept tokens of an image; the tower has kept `num_candidates` of `size`."""
        if self.keep_rate is not None and self.scorer != EVS:
            return min(num_candidates, num_kept_tokens(size, self.keep_rate))
        if self.visual_tokens is not None:
            return min(num_candidates, self.visual_tokens)
        return num_candidates

    @property
    def reads_prompt(self) -> bool:
        return callable(self.scorer) or self.scorer in READ_PROMPT

    @property
    def keeps_all(self) -> bool:
        return self.visual_tokens is None and self.keep_rate is None

    @property
    def reads_attention(self) -> bool:
        return not self.keeps_all and self.scorer != EVS and "attention" in inspect.signature(self.select).parameters

    @property
    def select(self) -> Scorer:
        return self.scorer if callable(self.scorer) else SCORERS[self.scorer]


def check_positions(positions: torch.LongTensor, num_tokens: int):
    """Raise a `ValueError` unless ascending positions, `(num_images, num_kept)`, are of these tokens, each once."""
    is_outside = (positions[:, 0] < 0) | (positions[:, -1] >= num_tokens)
    is_twice = (positions.diff(dim=1) == 0).any(dim=1)
    wrong = (is_outside | is_twice).nonzero()
    if len(wrong):
        raise ValueError(
            f"The scorer must return positions in [0, {num_tokens - 1}], each once, got "
            f"{positions[wrong[0, 0]].tolist()}."
        )


@dataclass(frozen=True)
class VisualTokens:
    """
    Visual tokens that are kept so far, in one group per image (or tile).

    Args:
        features (`list[torch.Tensor]`): Features of each group's kept tokens, `(num_kept, hidden_size)`.
        positions (`list[torch.Tensor]`): Their ascending positions in the whole group, `(num_kept,)`.
        sizes (`list[int]`): Number of tokens of each whole group.
        output (`ModelOutput`, *optional*): What Transformers' encoder returned for the whole groups.
        attention (`list[torch.Tensor]`, *optional*): What each image's [CLS] attends to in its whole group, `(size,)`.
    """

    features: list[torch.Tensor]
    positions: list[torch.Tensor]
    sizes: list[int]
    output: Any = None
    attention: list[torch.Tensor] | None = None

    @classmethod
    def whole(cls, groups: Sequence[torch.Tensor], output: Any = None) -> "VisualTokens":
        """Return all tokens of groups of shape `(size, hidden_size)`."""
        features = list(groups)
        sizes = [len(group) for group in features]
        positions = [torch.arange(len(group), device=group.device) for group in features]
        return cls(
            features=features,
            positions=positions,
            sizes=sizes,
            output=output,
        )

    def keep(self, positions: list[torch.Tensor]) -> "VisualTokens":
        """Return the tokens at these positions of whole groups."""
        features = [group[kept] for group, kept in zip(self.features, positions)]
        return replace(self, features=features, positions=positions)

    def select(
        self,
        at_exit: ExitSelection,
        rows: Sequence[int],
        text: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    ) -> "VisualTokens":
        """
        Return the tokens that the selection after the tower keeps. `rows` are the prompts of the groups. If the scorer
        reads them, `text` returns the prompts' embeddings, `(num_prompts, length, hidden_size)`, and their mask.
        """
        features = list(self.features)
        positions = list(self.positions)
        # Groups with as many tokens, of which as many are kept, form one batch.
        alike: dict[tuple[int, int], list[int]] = {}
        for group, size in enumerate(self.sizes):
            num_tokens = len(features[group])
            num_kept = at_exit.num_kept(size, num_tokens)
            if num_kept < num_tokens:
                alike.setdefault((num_tokens, num_kept), []).append(group)
        for (_, num_kept), groups in alike.items():
            batch = torch.stack([features[group] for group in groups])  # (num_groups, num_tokens, hidden_size)
            prompt = prompt_mask = None
            if at_exit.reads_prompt:
                prompts, mask = text()
                rows_of_batch = [rows[group] for group in groups]
                prompt = prompts[rows_of_batch]  # (num_groups, length, hidden_size)
                prompt_mask = mask[rows_of_batch]
            options = {}
            if at_exit.reads_attention:
                rows_of_attention = [self.attention[group][positions[group]] for group in groups]
                options["attention"] = torch.stack(rows_of_attention)  # (num_groups, num_tokens)
            chosen, kept_features = at_exit.select(batch, prompt, prompt_mask, num_kept, **options)
            if chosen.shape != (len(groups), num_kept):
                raise ValueError(
                    f"The scorer must return {num_kept} positions for each of {len(groups)} images, got positions of "
                    f"shape {tuple(chosen.shape)}."
                )
            # A prompt keeps its order, so a function of the user that returns the best first is put in order.
            chosen, order = chosen.sort(dim=1)
            if callable(at_exit.scorer):
                check_positions(chosen, batch.shape[1])
            kept_features = gather_tokens(kept_features, order)
            for index, group in enumerate(groups):
                features[group] = kept_features[index]
                positions[group] = positions[group][chosen[index]]
        return replace(self, features=features, positions=positions)

    def select_steps(self, at_exit: ExitSelection, num_steps: Sequence[int], **options) -> "VisualTokens":
        """Select among the groups of videos with these numbers of time steps. `options` are those of [`select`]."""
        if at_exit.keeps_all:
            return self
        if at_exit.reads_attention:
            raise ValueError(
                f"Scorers of videos have no `attention`, got {at_exit.scorer!r}. Use 'divprune' or 'evs'."
            )
        if at_exit.keep_rate is not None and at_exit.keep_rate * min(self.sizes) < 1:
            raise ValueError(
                f"`keep_rate` must keep a token of each time step of a video, got {at_exit.keep_rate} of "
                f"{min(self.sizes)} tokens."
            )
        if at_exit.scorer != EVS:
            return self.select(at_exit, **options)
        positions = []
        first = 0
        for number in num_steps:
            video = torch.stack(self.features[first : first + number])  # (num_steps, num_tokens, hidden_size)
            positions += [is_kept.nonzero()[:, 0] for is_kept in keep_changes(video, at_exit.keep_rate)]
            first += number
        return self.keep(positions)

    def joined(self, counts: Sequence[int]) -> "VisualTokens":
        """Return groups that are joined, so many at a time: the time steps of each video."""
        features = []
        positions = []
        sizes = []
        first = 0
        for count in counts:
            end = first + count
            features.append(torch.cat(self.features[first:end]))
            starts = [0, *accumulate(self.sizes[first:end])]
            positions.append(torch.cat([own + start for own, start in zip(self.positions[first:end], starts)]))
            sizes.append(starts[-1])
            first = end
        return replace(
            self,
            features=features,
            positions=positions,
            sizes=sizes,
        )


def special_token_ids(config: PreTrainedConfig) -> list[int]:
    """
    Return the ids of tokens that the configuration names: beginnings and ends, padding, marks of images. They are no
    words of a question, but would score like words.
    """
    ids = set()
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if name.endswith("_token_id"):
                ids.update(value if isinstance(value, list) else [value])
    return sorted(ids - {None})


def text_after_images(is_visual: torch.Tensor, is_text: torch.Tensor) -> torch.Tensor:
    """
    Return a mask of the text that scores: what follows the last visual token of a prompt, or all text if none follows.
    Masks have shape `(batch_size, length)`.
    """
    num_visual_left = is_visual.flip(1).cumsum(dim=1).flip(1)
    is_after = is_text & (num_visual_left == 0)
    return torch.where(is_after.any(dim=1, keepdim=True), is_after, is_text)
