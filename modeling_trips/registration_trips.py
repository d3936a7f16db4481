"""Registration of this project's classes with the Auto classes of Transformers, on import of the package."""

import transformers
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from .configuration_trips import TripsConfig, TripsTextConfig, TripsVisionConfig
from .modeling_trips import MODELS as WRITERS
from .modeling_trips_classification import TripsForImagesAndTextClassification
from .modeling_trips_grounding import TripsForVisualGrounding
from .modeling_trips_pretraining import TripsForPreTraining, TripsForRetrieval
from .modeling_trips_text import TripsTextModel
from .modeling_trips_vision import TripsSingleStreamModel, TripsVisionModel
from .processing_trips import TripsProcessor


CONFIGS = (TripsConfig, TripsVisionConfig, TripsTextConfig)
CLASSES = (
    *WRITERS,
    TripsForImagesAndTextClassification,
    TripsForVisualGrounding,
    TripsForRetrieval,
    TripsForPreTraining,
    TripsVisionModel,
    TripsSingleStreamModel,
    TripsTextModel,
)

# Auto classes load the class that a checkpoint names, or else the first class with its configuration.
MODELS = {
    auto_class: tuple(model for model in CLASSES if auto_class in model.auto_classes)
    for auto_class in sorted({auto_class for model in CLASSES for auto_class in model.auto_classes})
}


def model_classes(auto_class: str, config_class: type) -> tuple[type[PreTrainedModel], ...]:
    """Return the models that an Auto class makes from a configuration."""
    return tuple(model for model in MODELS[auto_class] if model.config_class is config_class)


def register():
    """Register the classes of this project with the Auto classes."""
    for config_class in CONFIGS:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class in MODELS:
            models = model_classes(auto_class, config_class)
            if models:
                getattr(transformers, auto_class).register(
                    config_class, models if len(models) > 1 else models[0], exist_ok=True
                )
    AutoProcessor.register(TripsConfig, TripsProcessor, exist_ok=True)
