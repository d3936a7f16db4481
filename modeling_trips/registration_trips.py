"""Registration of this project's classes with the Auto classes of Transformers, on import of the package."""

import transformers
from transformers import AutoConfig, AutoProcessor

from .configuration_trips import TripsConfig, TripsTextConfig, TripsVisionConfig
from .modeling_trips import TripsForConditionalGeneration, TripsForQuestionAnswering, TripsModel
from .modeling_trips_classification import TripsForImagesAndTextClassification
from .modeling_trips_grounding import TripsForVisualGrounding
from .modeling_trips_pretraining import TripsForPreTraining, TripsForRetrieval
from .modeling_trips_text import TripsTextModel
from .modeling_trips_vision import TripsSingleStreamModel, TripsVisionModel
from .processing_trips import TripsProcessor


# An Auto class loads the class that a checkpoint names, or else its first class with the checkpoint's configuration.
CLASSES = (
    TripsModel,
    TripsForConditionalGeneration,
    TripsForQuestionAnswering,
    TripsForImagesAndTextClassification,
    TripsForVisualGrounding,
    TripsForRetrieval,
    TripsForPreTraining,
    TripsVisionModel,
    TripsSingleStreamModel,
    TripsTextModel,
)
MODELS = {
    auto_class: tuple(model for model in CLASSES if auto_class in model.auto_classes)
    for auto_class in sorted({auto_class for model in CLASSES for auto_class in model.auto_classes})
}


def register():
    """Register the classes of this project with the Auto classes."""
    for config_class in (TripsConfig, TripsVisionConfig, TripsTextConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, models in MODELS.items():
        for config_class in {model.config_class for model in models}:
            own = tuple(model for model in models if model.config_class is config_class)
            getattr(transformers, auto_class).register(config_class, own if len(own) > 1 else own[0], exist_ok=True)
    AutoProcessor.register(TripsConfig, TripsProcessor, exist_ok=True)
