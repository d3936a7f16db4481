"""Settings of patch selection, which a model's configuration carries into vLLM, and what follows from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedConfig

from ..configuration_trips import SelectionSchedule
from ..hosts.vlm.families import Family
from ..hosts.vlm.guide import TextGuide
from ..hosts.vlm.visual_tokens import ExitSelection, text_after_images
from ..hosts.vlm.wrapper import check_generative
from ..patch_selection import num_kept_tokens


# Architecture of vLLM for each type of model.
ARCHITECTURES = {
    "llava": "TripsLlavaForConditionalGeneration",
    "qwen2_vl": "TripsQwen2VLForConditionalGeneration",
    "qwen2_5_vl": "TripsQwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "TripsQwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "TripsQwen3VLMoeForConditionalGeneration",
    **dict.fromkeys(
        ("idefics3", "internvl", "llava_next", "llava_onevision"),
        "TripsVlmForConditionalGeneration",
    ),
}
NOT_SUPPORTED = {
    **dict.fromkeys(("gemma3", "paligemma"), "vLLM does not compute its attention in both directions on CPUs"),
    "smolvlm": "its processor does not count tokens, as vLLM's Transformers backend needs",
}
KEYS = ("schedule", "visual_tokens", "visual_scorer", "text_guide")
# Scorers whose choice depends on the image and the question alone, so that vLLM may cache it.
SCORERS = ("prompt", "diversity", "pooling")


@dataclass(frozen=True)
class ServingSettings:
    """
    Selection inside and after the vision tower, as in [`apply_patch_selection`]. `--hf-overrides` sets the fields as
    `patch_selection` of the model's configuration: `{"patch_selection": {"visual_tokens": 64}}`.

    Args:
        schedule (`str`, *optional*, defaults to `"unpruned"`): Schedule of the tower, as in `8:image:0.33`.
        visual_tokens (`int`, *optional*): Number of visual tokens per image. Default: all that the tower keeps.
        visual_scorer (`str`, *optional*, defaults to `"prompt"`): Scorer of these tokens, one of `SCORERS`.
        text_guide (`str`, *optional*): Folder or repository of the [`TextGuide`] for a layer that the text scores.

    Raises:
        TypeError: `visual_tokens` is not an integer.
        ValueError: A setting is unknown or out of its range.
    """

    schedule: str = "unpruned"
    visual_tokens: int | None = None
    visual_scorer: str = "prompt"
    text_guide: str | None = None
    tower: SelectionSchedule = field(init=False)
    at_exit: ExitSelection = field(init=False)

    def __post_init__(self):
        if self.visual_scorer not in SCORERS:
            raise ValueError(f"`visual_scorer` must be one of {', '.join(SCORERS)}, got {self.visual_scorer!r}.")
        tower = SelectionSchedule.parse(self.schedule)
        if any(selection.guidance not in ("text", "image") for selection in tower.selections):
            raise ValueError(f"Layers in vLLM must be scored by the text or the image, got {tower}.")
        object.__setattr__(self, "tower", tower)
        object.__setattr__(self, "at_exit", ExitSelection(self.visual_tokens, scorer=self.visual_scorer))
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

    def check_type(self, config: PreTrainedConfig):
        name = config.model_type
        if name not in ARCHITECTURES:
            reason = f": {NOT_SUPPORTED[name]}" if name in NOT_SUPPORTED else ""
            raise ValueError(f"Patch selection in vLLM supports {', '.join(ARCHITECTURES)}, not {name}{reason}.")
        tower = config.vision_config.model_type
        if name == "llava" and tower not in ("clip_vision_model", "siglip_vision_model"):
            raise ValueError(f"Patch selection in vLLM supports LLaVA with a tower of CLIP or SigLIP, got {tower}.")
        if name == "idefics3" and self.visual_tokens is not None:
            raise ValueError(f"`visual_tokens` is not supported for {name}, whose tokens are separated tile by tile.")
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
            self.check_number(size)
        if self.visual_scorer == "pooling":  # an image that does not fit would end the engine
            if size is None or self.visual_tokens is None or self.tower.layers:
                raise ValueError(
                    "`visual_scorer` 'pooling' needs `visual_tokens`, no schedule and images of one square shape. Use "
                    "'prompt' or 'diversity'."
                )
            self.at_exit.select(torch.zeros(1, size, 1), None, None, self.visual_tokens)
        return guide

    def check_number(self, size: int):
        """Raise a ValueError if the tower keeps fewer than `visual_tokens` of an image (or tile) of `size` tokens."""
        most = replace(self, visual_tokens=None).num_kept(size)
        if self.visual_tokens is not None and self.visual_tokens > most:
            raise ValueError(
                f"`visual_tokens` must be at most {most}, the tokens of {size} that {self.schedule} keeps, got "
                f"{self.visual_tokens}."
            )

    @property
    def reads_prompt(self) -> bool:
        """Whether the question decides which tokens are kept."""
        return self.text_guide is not None or (self.visual_tokens is not None and self.at_exit.reads_prompt)

    @property
    def keeps_all(self) -> bool:
        return self.visual_tokens is None and not self.tower.layers

    def num_kept_in_tower(self, num_units: int) -> int:
        """Return how many visual tokens of an image (or tile) the tower keeps."""
        for selection in self.tower.selections:
            num_units = num_kept_tokens(num_units, selection.keep_rate)
        return num_units

    def num_kept(self, size: int) -> int:
        """Return how many visual tokens of a square grid, and maybe the tower's [CLS], are kept."""
        num_patches = math.isqrt(size) ** 2
        return self.at_exit.num_kept(size, size - num_patches + self.num_kept_in_tower(num_patches))

    def describe(self, size: int | None) -> str:
        """Return a line that says what is kept of images (or tiles) of `size` tokens, by what, and what is cached."""
        if self.keeps_all:
            return "keeps all visual tokens: neither `schedule` nor `visual_tokens` is set"
        number = self.visual_tokens or "a share" if size is None else self.num_kept(size)
        layers = self.tower.by_layer.items()
        in_tower = [f"; tower layer {layer} keeps {own.keep_rate} by the {own.guidance}" for layer, own in layers]
        by = "question: images are encoded per question" if self.reads_prompt else "image: images are encoded once"
        return f"keeps {number} of {size or 'the'} visual tokens{''.join(in_tower)}; chosen by the {by}"


def find_question(ids: Sequence[int], image_token_id: int) -> list[int]:
    """Return the text after the last image of a prompt, or all text if none follows."""
    row = torch.tensor([ids], dtype=torch.long)
    is_visual = row == image_token_id
    return row[text_after_images(is_visual, ~is_visual)].tolist()


def split_calls(sizes: Sequence[int], most: int) -> list[slice]:
    """Return the items of each call of the encoder: as many as have `most` patches together, but at least one."""
    calls, first, total = [], 0, 0
    for index, size in enumerate(sizes):
        if index > first and total + size > most:
            calls.append(slice(first, index))
            first, total = index, 0
        total += size
    return [*calls, slice(first, len(sizes))]
