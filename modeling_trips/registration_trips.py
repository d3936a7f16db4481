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
AUTO_CLASSES = sorted({auto_class for model in CLASSES for auto_class in model.auto_classes})
MODELS = {
    auto_class: tuple(model for model in CLASSES if auto_class in model.auto_classes) for auto_class in AUTO_CLASSES
}


def register():
    """Register the classes of this project with the Auto classes."""
    config_classes = (TripsConfig, TripsVisionConfig, TripsTextConfig)
    for config_class in config_classes:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for name, models in MODELS.items():
        auto_class = getattr(transformers, name)
        for config_class in config_classes:
            classes = tuple(model for model in models if model.config_class is config_class)
            if classes:
                value = classes if len(classes) > 1 else classes[0]
                auto_class.register(config_class, value, exist_ok=True)
    AutoProcessor.register(TripsConfig, TripsProcessor, exist_ok=True)
