"""
The one list of what users load by name: the classes behind each Auto class, and the pipelines.

A new class is entered here once. From the list come the registration on import, and the `auto_map` and
`custom_pipelines` of every saved checkpoint. As this file imports all others, and a checkpoint names its classes as
this file's, Transformers copies all of them into every saved checkpoint, so that it holds the code of every class.
"""

import transformers
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from .configuration_trips import TripsConfig, TripsTextConfig, TripsVisionConfig
from .configuration_trips_parts import remove_code_references
from .modeling_trips import TripsModel
from .modeling_trips_classification import TripsForImagesAndTextClassification
from .modeling_trips_generation import TripsForConditionalGeneration
from .modeling_trips_grounding import TripsForVisualGrounding
from .modeling_trips_layers import TripsPreTrainedModel, class_before_sharding
from .modeling_trips_pretraining import TripsForPreTraining
from .modeling_trips_question_answering import TripsForQuestionAnswering
from .modeling_trips_retrieval import TripsForRetrieval
from .modeling_trips_single_stream import TripsSingleStreamModel
from .modeling_trips_text import TripsTextModel
from .modeling_trips_vision import TripsVisionModel
from .pipeline_trips import (
    TripsImageToTextPipeline,
    TripsVisualQuestionAnsweringPipeline,
    TripsZeroShotImageClassificationPipeline,
)
from .processing_trips import TripsProcessor


CONFIGS = (TripsConfig, TripsVisionConfig, TripsTextConfig)

# Of several classes with one configuration, a checkpoint's own comes first; the first one serves other checkpoints.
MODELS = {
    "AutoModel": (TripsModel, TripsForRetrieval, TripsVisionModel, TripsSingleStreamModel, TripsTextModel),
    "AutoModelForImageTextToText": (TripsForConditionalGeneration, TripsForQuestionAnswering),
    "AutoModelForPreTraining": (TripsForPreTraining,),
    "AutoModelForSequenceClassification": (TripsForImagesAndTextClassification,),
    "AutoModelForVisualQuestionAnswering": (TripsForQuestionAnswering,),
    "AutoModelForZeroShotImageClassification": (TripsForRetrieval,),
    "AutoModelForZeroShotObjectDetection": (TripsForVisualGrounding,),
}

# Task -> pipeline and the Auto class that loads its model.
PIPELINES = {
    pipeline_class.default_task: (pipeline_class, auto_class)
    for pipeline_class, auto_class in (
        (TripsImageToTextPipeline, "AutoModelForImageTextToText"),
        (TripsVisualQuestionAnsweringPipeline, "AutoModelForVisualQuestionAnswering"),
        (TripsZeroShotImageClassificationPipeline, "AutoModelForZeroShotImageClassification"),
    )
}


def model_classes(auto_class: str, config_class: type) -> tuple[type[PreTrainedModel], ...]:
    """The models that an Auto class makes from a configuration."""
    return tuple(model for model in MODELS[auto_class] if model.config_class is config_class)


def register():
    """Makes the Auto classes know the classes of this project."""
    for config_class in CONFIGS:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class in MODELS:
            models = model_classes(auto_class, config_class)
            if models:
                getattr(transformers, auto_class).register(
                    config_class, models if len(models) > 1 else models[0], exist_ok=True
                )
    AutoProcessor.register(TripsConfig, TripsProcessor, exist_ok=True)


def _reference(cls: type) -> str:
    """How a checkpoint names a class: `"modeling_trips.TripsModel"`."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def auto_map(model_class: type[PreTrainedModel]) -> dict[str, str]:
    """
    The `auto_map` of a checkpoint of `model_class`: the class for each Auto class that takes its configuration. Models
    are named as this module's, so that whichever is loaded brings the code of all, to be saved with it again.
    """
    config_class, here = model_class.config_class, __name__.rpartition(".")[2]
    references = {"AutoConfig": _reference(config_class)}
    for auto_class in MODELS:
        models = model_classes(auto_class, config_class)
        if models:
            references[auto_class] = f"{here}.{(model_class if model_class in models else models[0]).__name__}"
    if config_class is TripsConfig:
        references["AutoProcessor"] = _reference(TripsProcessor)
    return references


def custom_pipelines(model_class: type[PreTrainedModel]) -> dict[str, dict]:
    """
    The `custom_pipelines` of a checkpoint of `model_class`: those that its head runs, so that `pipeline` can tell the
    task from the model. A checkpoint does not offer tasks for which it has no weights.
    """
    return {
        task: {"impl": _reference(pipeline_class), "pt": [auto_class], "type": "multimodal"}
        for task, (pipeline_class, auto_class) in PIPELINES.items()
        if MODELS[auto_class][0] is model_class
    }


def describe_code(model: PreTrainedModel):
    """Name the code of this project, and no other, in the configurations of a model that is about to be saved."""
    remove_code_references([model.config, getattr(model, "generation_config", None)])
    model_class = class_before_sharding(type(model))
    model.config.auto_map = auto_map(model_class)
    pipelines = custom_pipelines(model_class)
    if pipelines:
        model.config.custom_pipelines = pipelines


TripsPreTrainedModel.describe_code = describe_code  # a class cannot import the list that it is in
