"""TRIPS for Transformers: vision-language models whose text selects the image patches worth computing."""

from .configuration_trips import (
    TripsConfig,
    TripsDecoderConfig,
    TripsFusionConfig,
    TripsTextConfig,
    TripsVisionConfig,
)
from .modeling_trips import TripsModel, TripsModelOutput, TripsPreTrainedModel
from .modeling_trips_generation import TripsForConditionalGeneration, TripsSeq2SeqLMOutput
from .modeling_trips_question_answering import TripsAnswerRanking, TripsForQuestionAnswering
from .modeling_trips_text import TripsDecoder, TripsFusionModel, TripsTextModel
from .modeling_trips_vision import TripsSelection, TripsVisionModel, TripsVisionModelOutput, TripsVisionPrefix
from .pipeline_trips import TripsImageToTextPipeline, TripsVisualQuestionAnsweringPipeline
from .processing_trips import TripsProcessor, convert_to_rgb
from .registration_trips import register
from .version import __version__


register()


__all__ = [
    "__version__",
    "TripsAnswerRanking",
    "TripsConfig",
    "TripsDecoder",
    "TripsDecoderConfig",
    "TripsForConditionalGeneration",
    "TripsForQuestionAnswering",
    "TripsFusionConfig",
    "TripsFusionModel",
    "TripsImageToTextPipeline",
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
    "TripsVisualQuestionAnsweringPipeline",
    "convert_to_rgb",
]
