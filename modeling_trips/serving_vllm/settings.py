"""Settings of patch selection, which a model's configuration carries into vLLM."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from ..configuration_trips import SelectionSchedule
from ..hosts.vlm.families import Family
from ..hosts.vlm.guide import TextGuide
from ..hosts.vlm.pruning import ExitSelection
from ..hosts.vlm.wrapper import check_generative
from ..patch_selection import num_kept_tokens


# Architecture of vLLM for each type of model.
ARCHITECTURES = {
    "llava": "TripsLlavaForConditionalGeneration",
    **dict.fromkeys(
        ("idefics3", "internvl", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen2_vl"),
        "TripsForConditionalGeneration",
    ),
}
NOT_SUPPORTED = {
    "gemma3": "vLLM does not compute its attention in both directions on CPUs, so it is not tested",
    "paligemma": "vLLM does not compute its attention in both directions on CPUs, so it is not tested",
    "qwen3_vl": "vLLM's Transformers backend drops its deepstack features",
    "qwen3_vl_moe": "vLLM's Transformers backend drops its deepstack features",
    "smolvlm": "its processor does not count tokens, as vLLM's Transformers backend needs",
}
KEYS = ("patch_selection", "visual_tokens", "visual_scorer", "text_guide")
# Scorers whose choice depends on the image and the question alone, so that vLLM may cache it.
SCORERS = ("prompt", "diversity", "pooling")


@dataclass(frozen=True)
class ServingSettings:
    """
    Selection inside and after the vision tower, as in [`apply_patch_selection`]. The fields are keys of the model's
    configuration, which `--hf-overrides` sets.

    Args:
        patch_selection (`str`, *optional*, defaults to `"unpruned"`): Schedule of the tower, as in `8:image:0.33`.
        visual_tokens (`int`, *optional*): Number of visual tokens per image. Default: all that the tower keeps.
        visual_scorer (`str`, *optional*, defaults to `"prompt"`): Scorer of these tokens, one of `SCORERS`.
        text_guide (`str`, *optional*): Folder or repository of the [`TextGuide`] for a layer that the text scores.

    Raises:
        TypeError: `visual_tokens` is not an integer.
        ValueError: A setting is unknown or out of its range.
    """

    patch_selection: str = "unpruned"
    visual_tokens: int | None = None
    visual_scorer: str = "prompt"
    text_guide: str | None = None
    schedule: SelectionSchedule = field(init=False)
    at_exit: ExitSelection = field(init=False)

    def __post_init__(self):
        if self.visual_scorer not in SCORERS:
            raise ValueError(f"`visual_scorer` must be one of {', '.join(SCORERS)}, got {self.visual_scorer!r}.")
        schedule = SelectionSchedule.parse(self.patch_selection)
        if any(selection.guidance not in ("text", "image") for selection in schedule.selections):
            raise ValueError(f"Layers in vLLM must be scored by the text or the image, got {schedule}.")
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "at_exit", ExitSelection(self.visual_tokens, scorer=self.visual_scorer))
        if schedule.first_text_layer is not None and self.text_guide is None:
            raise ValueError(f"Layer {schedule.first_text_layer} is scored by the text, but `text_guide` is not set.")

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "ServingSettings":
        """Return the settings of a model's configuration. Raise a ValueError if they do not fit its type."""
        given: dict[str, Any] = {name: getattr(config, name) for name in KEYS if hasattr(config, name)}
        cls(**given).check_type(config)
        return cls(**given)

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
        if name in ("llava_next", "llava_onevision") and self.schedule.layers:
            if self.text_guide is not None:
                raise ValueError(f"`text_guide` is not supported for {name}.")
            most = self.num_kept_in_tower((config.vision_config.image_size // config.vision_config.patch_size) ** 2)
            if self.visual_tokens is None or self.visual_tokens > most:
                raise ValueError(  # images keep different numbers, but at least these
                    f"`visual_tokens` of {name} must be at most {most}, the tokens of a tile that "
                    f"{self.patch_selection} keeps, got {self.visual_tokens}."
                )

    def check_fits(self, family: Family) -> TextGuide | None:
        """Return the guide. Raise a TypeError or a ValueError if the settings do not fit the model."""
        guide = None if self.text_guide is None else TextGuide.from_pretrained(self.text_guide)
        family.check_schedule(self.schedule)
        check_generative(family, self.schedule, self.at_exit, guide)
        return guide

    @property
    def reads_prompt(self) -> bool:
        """Whether the question decides which tokens are kept."""
        return self.text_guide is not None or (self.visual_tokens is not None and self.at_exit.reads_prompt)

    def num_kept_in_tower(self, num_units: int) -> int:
        """Return how many visual tokens of an image (or tile) the tower keeps."""
        for selection in self.schedule.selections:
            num_units = num_kept_tokens(num_units, selection.keep_rate)
        return num_units
