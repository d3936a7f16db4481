"""TRIPS for Transformers: vision-language models whose text selects the image patches worth computing."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
)

from .configuration_trips import (
    TripsConfig,
    TripsDecoderConfig,
    TripsFusionConfig,
    TripsTextConfig,
    TripsVisionConfig,
)
from .modeling_trips import TripsModel, TripsModelOutput, TripsPreTrainedModel
from .modeling_trips_question_answering import TripsAnswerRanking, TripsForQuestionAnswering, TripsSeq2SeqLMOutput
from .modeling_trips_text import TripsDecoder, TripsFusionModel, TripsTextModel
from .modeling_trips_vision import TripsSelection, TripsVisionModel, TripsVisionModelOutput, TripsVisionPrefix
from .processing_trips import TripsProcessor, convert_to_rgb
from .version import __version__


for _config in (TripsConfig, TripsVisionConfig, TripsTextConfig):
    AutoConfig.register(_config.model_type, _config)
AutoModel.register(TripsConfig, TripsModel)
AutoModel.register(TripsVisionConfig, TripsVisionModel)
AutoModel.register(TripsTextConfig, TripsTextModel)
AutoModelForVisualQuestionAnswering.register(TripsConfig, TripsForQuestionAnswering)
AutoProcessor.register(TripsConfig, TripsProcessor)


__all__ = [
    "__version__",
    "TripsAnswerRanking",
    "TripsConfig",
    "TripsDecoder",
    "TripsDecoderConfig",
    "TripsForQuestionAnswering",
    "TripsFusionConfig",
    "TripsFusionModel",
    "TripsModel",
    "TripsModelOutput",
    "TripsPreTrainedModel",
    "TripsProcessor",
    "TripsSelection",
    "TripsSeq2SeqLMOutput",
    "TripsTextConfig",
    "TripsTextModel",
    "TripsVisionConfig",
    "TripsVisionModel",
    "TripsVisionModelOutput",
    "TripsVisionPrefix",
    "convert_to_rgb",
]
