"""Settings of patch selection, which a model's configuration carries into vLLM, and what follows from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..hosts.vlm import families
from ..hosts.vlm.families import Family
from ..hosts.vlm.guide import TextGuide
from ..hosts.vlm.scoring import READ_PROMPT
from ..hosts.vlm.visual_tokens import ExitSelection, text_after_images
from ..hosts.vlm.wrapper import check_generative
from ..patch_selection import num_kept_tokens
from ..schedule_trips import SelectionSchedule
from . import ARCHITECTURES


DIFFERS = "answers of vLLM's own class differ from those of Transformers without selection, too"
NOT_SUPPORTED = {
    **families.NOT_SUPPORTED,
    "lfm2_vl": DIFFERS,
    "paligemma": "its whole prompt attends in both directions in Transformers, but only its image in vLLM",
    "qwen3_5": DIFFERS,
}
# Types of models whose images (or tiles) have one size, for which only the image may choose because their processors
# write other text around it or Transformers does not have them, whose towers' attention scorers may read, and whose
# towers may select.
ONE_SIZE = ("gemma3", "idefics3", "internvl", "internvl_chat", "llava", "smolvlm")
BY_IMAGE = ("internvl_chat", "minicpmv4_6", "mistral3")
WATCHED = ("idefics3", "internvl", "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
IN_TOWER = (*WATCHED, "llava_next", "llava_onevision")
KEYS = ("schedule", "visual_tokens", "keep_rate", "visual_scorer", "request_scorers", "text_guide")
NUMBERS = ("visual_tokens", "keep_rate")
# Keys that a request may have among its `mm_processor_kwargs`.
REQUEST_KEYS = (*NUMBERS, "visual_scorer")
# Scorers whose choice depends on the image and the question alone, so that vLLM may cache it.
SCORERS = ("divprune", "prompt", "cdpruner", "pooling", "vispruner")
MOST_TOKENS = 1_000_000  # of an image: more than any prompt has, and exact in float64
NUM_CHOICES = 3  # of a request: the number, the rate, and the scorer's place in `SCORERS`


@dataclass(frozen=True)
class ServingSettings:
    """
    Selection inside and after the vision tower, as in [`apply_patch_selection`]. `--hf-overrides` sets the fields as
    `patch_selection` of the model's configuration: `{"patch_selection": {"visual_tokens": 64}}`.

    Args:
        schedule (`str`, *optional*, defaults to `"unpruned"`): Schedule of the tower, as in `8:image:0.33`.
        visual_tokens (`int`, *optional*): Number of visual tokens per image. Default: all that the tower keeps.
        keep_rate (`float`, *optional*): Share of the visual tokens to keep per image, in (0, 1], instead of a number.
        visual_scorer (`str`, *optional*, defaults to `"divprune"`): Scorer of these tokens, one of `SCORERS`.
        request_scorers (`Sequence[str]`, *optional*, defaults to `()`): Scorers that a request may name instead.
        text_guide (`str`, *optional*): Folder or repository of the [`TextGuide`] for a layer that the text scores.

    Raises:
        TypeError: `visual_tokens` or `keep_rate` is not a number.
        ValueError: A setting is unknown or out of its range, or both a number and a rate are given.
    """

    schedule: str = "unpruned"
    visual_tokens: int | None = None
    keep_rate: float | None = None
    visual_scorer: str = "divprune"
    request_scorers: Sequence[str] = ()
    text_guide: str | None = None
    tower: SelectionSchedule = field(init=False)
    at_exit: ExitSelection = field(init=False)

    def __post_init__(self):
        for scorer in self.scorers:
            if scorer not in SCORERS:
                raise ValueError(f"Scorers must be among {', '.join(SCORERS)}, got {scorer!r}.")
        object.__setattr__(self, "request_scorers", tuple(self.request_scorers))  # JSON has lists
        tower = SelectionSchedule.parse(self.schedule)
        if any(selection.guidance == "random" or selection.only_scores for selection in tower.selections):
            raise ValueError(f"Layers in vLLM must keep a share scored by the text or the image, got {tower}.")
        object.__setattr__(self, "tower", tower)
        at_exit = ExitSelection(self.visual_tokens, self.keep_rate, self.visual_scorer)
        object.__setattr__(self, "at_exit", at_exit)
        if (self.visual_tokens or 0) > MOST_TOKENS:
            raise ValueError(f"`visual_tokens` must be at most {MOST_TOKENS}, got {self.visual_tokens}.")
        if tower.first_text_layer is not None and self.text_guide is None:
            raise ValueError(f"Layer {tower.first_text_layer} is scored by the text, but `text_guide` is not set.")

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "ServingSettings":
        """Return the settings of a model's configuration. Raise a ValueError if they do not fit its type."""
        given = getattr(config, "patch_selection", None)
        if not isinstance(given, dict) or not given.keys() <= {*KEYS}:
            raise ValueError(
                f"`patch_selection` of the overrides must be a dictionary with keys among {', '.join(KEYS)}, such as "
                f'{{"visual_tokens": 64}}, got {given!r}.'
            )
        settings = cls(**given)
        settings.check_type(config)
        if config.architectures != [architecture := ARCHITECTURES[config.model_type]]:
            raise ValueError(f"`architectures` must be ['{architecture}'], got {config.architectures}.")
        return settings

    def of_request(self, options: Mapping[str, object]) -> "ServingSettings":
        """
        Return the settings of a request whose options may have `visual_tokens`, a number or `"all"`, or `keep_rate`
        instead of the server's, and `visual_scorer`. `"all"` keeps whole images: nothing is selected inside the tower,
        either. Raise a ValueError if they are out of range, or the operator does not allow the scorer.
        """
        given: dict[str, Any] = {name: options[name] for name in REQUEST_KEYS if options.get(name) is not None}
        if not given:
            return self
        if given == {"visual_tokens": "all"}:
            return ServingSettings()
        if "visual_scorer" in given and given["visual_scorer"] not in self.request_scorers:
            allowed = ", ".join(self.request_scorers) or "none"
            raise ValueError(
                f"`visual_scorer` of a request must be among the `request_scorers` of the server ({allowed}), got "
                f"{given['visual_scorer']!r}."
            )
        if given.keys() & {*NUMBERS}:
            given = {**dict.fromkeys(NUMBERS), **given}
        try:
            return replace(self, **given)
        except TypeError as error:
            raise ValueError(str(error)) from error

    def encode(self) -> torch.Tensor:
        """Return what a request may choose as numbers that travel with its images. [`choice_of`] reads them."""
        number = self.visual_tokens or 0
        rate = self.keep_rate or 0.0
        scorer = SCORERS.index(self.visual_scorer)
        if self.tower.layers and self.at_exit.keeps_all:
            rate = 1.0
        return torch.tensor([number, rate, scorer], dtype=torch.float64)

    def choice_of(self, encoded: Sequence[float]) -> ExitSelection | None:
        """Return the selection after the tower of a request; `None` if its images stay whole, also in the tower."""
        number, rate, scorer = encoded
        if number == 0 and rate == 0:
            return None
        return ExitSelection(int(number) or None, rate or None, SCORERS[int(scorer)])

    def check_type(self, config: PreTrainedConfig):
        name = config.model_type
        if name not in ARCHITECTURES:
            reason = f": {NOT_SUPPORTED[name]}" if name in NOT_SUPPORTED else ""
            raise ValueError(f"Patch selection in vLLM supports {', '.join(ARCHITECTURES)}, not {name}{reason}.")
        tower = config.vision_config.model_type
        if name == "llava" and tower not in ("clip_vision_model", "siglip_vision_model"):
            raise ValueError(f"Patch selection in vLLM supports LLaVA with a tower of CLIP or SigLIP, got {tower}.")
        if name not in WATCHED and "vispruner" in self.scorers:
            raise ValueError(f"The scorer 'vispruner' is supported in vLLM for {', '.join(WATCHED)}, not for {name}.")
        if name in BY_IMAGE and self.may_read_prompt:
            raise ValueError(f"Scorers must choose by the image for {name}, got {', '.join(self.scorers)}.")
        if name not in IN_TOWER and self.tower.layers:
            raise ValueError(f"A schedule is not supported for {name} in vLLM, got {self.tower}. Use `keep_rate`.")
        if name in ("llava_next", "llava_onevision") and self.tower.layers:
            if self.text_guide is not None or self.visual_tokens is None:
                raise ValueError(f"A schedule for {name} needs `visual_tokens` and no `text_guide`, got {self}.")
            # Images keep different numbers, but at least those of a tile.
            self.check_number((config.vision_config.image_size // config.vision_config.patch_size) ** 2)

    def check_fits(self, family: Family) -> TextGuide | None:
        """Return the guide. Raise a TypeError or a ValueError if the settings do not fit the model."""
        guide = None if self.text_guide is None else TextGuide.from_pretrained(self.text_guide)
        family.check_schedule(self.tower)
        check_generative(family, self.tower, self.at_exit, guide)
        size = family.tokens_per_image
        if size is not None:
            self.check_size(size)
        elif "pooling" in self.scorers:  # an image that does not fit would end the engine
            raise ValueError("The scorer 'pooling' needs images of one square shape. Use 'prompt' or 'divprune'.")
        return guide

    def check_size(self, size: int):
        """Raise a ValueError if the number of tokens or the scorer does not fit images (or tiles) of `size` tokens."""
        self.at_exit.check_fits(size, in_tower=bool(self.tower.layers))
        self.check_number(size)

    def check_steps(self, size: int):
        """Raise a ValueError if the rate keeps less than one token of a time step of `size` tokens of a video."""
        if self.keep_rate is not None and self.keep_rate * size < 1:
            raise ValueError(
                f"`keep_rate` must keep a token of each time step of a video, got {self.keep_rate} of {size} tokens. "
                "Raise it, or start without videos: --limit-mm-per-prompt '{\"video\": 0}'."
            )

    def check_number(self, size: int):
        """Raise a ValueError if the tower keeps fewer than `visual_tokens` of an image (or tile) of `size` tokens."""
        most = replace(self, visual_tokens=None, keep_rate=None).num_kept(size)
        if self.visual_tokens is not None and self.visual_tokens > most:
            raise ValueError(
                f"`visual_tokens` must be at most {most}, the tokens of {size} that {self.schedule} keeps, got "
                f"{self.visual_tokens}."
            )

    @property
    def scorers(self) -> tuple[str, ...]:
        return (self.visual_scorer, *self.request_scorers)

    @property
    def may_read_prompt(self) -> bool:
        """Whether the question may decide for a request."""
        return self.reads_prompt or not {*READ_PROMPT}.isdisjoint(self.request_scorers)

    @property
    def reads_prompt(self) -> bool:
        """Whether the question decides which tokens are kept."""
        return self.text_guide is not None or (self.at_exit.reads_prompt and not self.at_exit.keeps_all)

    @property
    def keeps_all(self) -> bool:
        return self.at_exit.keeps_all and not self.tower.layers

    def num_kept_in_tower(self, num_units: int) -> int:
        """Return how many visual tokens of an image (or tile) the tower keeps."""
        for selection in self.tower.selections:
            num_units = num_kept_tokens(num_units, selection.keep_rate)
        return num_units

    def num_kept(self, size: int) -> int:
        """Return how many visual tokens of a square grid, and maybe the tower's [CLS], are kept."""
        num_patches = math.isqrt(size) ** 2
        num_others = size - num_patches
        num_candidates = num_others + self.num_kept_in_tower(num_patches)
        return self.at_exit.num_kept(size, num_candidates)

    def describe(self, size: int | None) -> str:
        """Return a line that says what is kept of images (or tiles) of `size` tokens, by what, and what is cached."""
        if self.keeps_all:
            return "keeps all visual tokens: neither `schedule` nor `visual_tokens` nor `keep_rate` is set"
        if size is None:
            number = self.visual_tokens or self.keep_rate or "a share"
            kept = f"{number} of the visual tokens"
        else:
            kept = f"{self.num_kept(size)} of {size} visual tokens"
        in_tower = ""
        for layer, selection in self.tower.by_layer.items():
            in_tower += f"; tower layer {layer} keeps {selection.keep_rate} by the {selection.guidance}"
        by = "question: images are encoded per question" if self.reads_prompt else "image: images are encoded once"
        return f"keeps {kept}{in_tower}; chosen by the {by}"


def find_question(ids: Sequence[int], visual_ids: Sequence[int], special_ids: Sequence[int] = ()) -> list[int]:
    """
    Return the text after the last image or video of a prompt, or all text if none follows, without special tokens.
    `visual_ids` are the tokens of their placeholders.
    """
    row = torch.tensor([ids], dtype=torch.long)
    visual = torch.tensor(visual_ids, dtype=torch.long)
    special = torch.tensor(special_ids, dtype=torch.long)
    is_visual = torch.isin(row, visual)
    is_special = torch.isin(row, special)
    is_text = ~is_visual & ~is_special
    is_question = text_after_images(is_visual, is_text)
    return row[is_question].tolist()


def split_calls(sizes: Sequence[int], most: int, choices: Sequence) -> list[slice]:
    """
    Return the items of each call of the encoder, whose `choices` are equal: as many as have `most` patches together,
    but at least one.
    """
    calls = []
    first = 0
    total = 0
    for index, size in enumerate(sizes):
        is_full = index > first and total + size > most
        if is_full or choices[index] != choices[first]:
            calls.append(slice(first, index))
            first = index
            total = 0
        total += size
    return [*calls, slice(first, len(sizes))]
