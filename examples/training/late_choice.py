"""Where models select that learn from scratch what many texts share: captioning, retrieval, pre-training."""

from dataclasses import dataclass, field

from transformers import AutoConfig

from modeling_trips import TripsConfig
from trips_examples.training.options import ModelArguments


def late_choice(num_layers: int) -> dict:
    """
    A selection for towers that many texts share, as fields of `TripsConfig`: the image guides where the paper's text
    does, at 5/12 and 10/12 of `num_layers` (but not before layer 3: its [CLS] has seen too little there), the text in
    the last layer, at the door of the fusion encoder. Features that know no text are then of the same trunk, and a
    text costs next to nothing in the tower.
    """
    places = (round(num_layers * part / 12) for part in (5, 10))
    thinning = [layer for layer in places if 3 <= layer < num_layers]
    return {
        "selection_layers": [*thinning, num_layers],
        "keep_rate": [0.7] * len(thinning) + [0.3],
        "selection_guidance": ["image"] * len(thinning) + ["text"],
    }


@dataclass
class LateChoiceModelArguments(ModelArguments):
    """`ModelArguments` of a model that selects by `late_choice` if it starts from scratch, unless options say more."""

    selection_layers: list[int] | None = field(
        default=None,
        metadata={
            "help": "ViT layers that select patches, numbered from 1. Default: the checkpoint's. From scratch: 5, "
            "10 and 12 of 12 layers, at --keep_rate 0.7 0.7 0.3 and --selection_guidance image image text, so that "
            "the image thins out what all texts share, and each text chooses last; 3 and 4 of the tiny preset's 4, at "
            "0.7 0.3. The paper's: --selection_layers 5 10"
        },
    )

    @property
    def num_vision_layers(self) -> int:
        """Of a model from scratch, or of the vision tower that it starts from."""
        if not self.starts_from_parts:
            return TripsConfig.from_preset(self.preset).vision_config.num_hidden_layers
        config = AutoConfig.from_pretrained(self.vision_model_name_or_path)
        config = getattr(config, "vision_config", config)  # CLIP's
        return getattr(config, "num_hidden_layers", 12)  # what has none is refused when it is loaded

    def config_overrides(self) -> dict:
        by_default = self.model_name_or_path is None and self.selection_layers is None
        schedule = late_choice(self.num_vision_layers) if by_default else {}
        return {**schedule, **super().config_overrides()}
