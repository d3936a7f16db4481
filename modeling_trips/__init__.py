"""TRIPS for Transformers: vision-language models whose text selects the image patches worth computing."""

from .configuration_trips import (
    UNPRUNED,
    LayerSelection,
    SelectionSchedule,
    TripsConfig,
    TripsDecoderConfig,
    TripsFusionConfig,
    TripsTextConfig,
    TripsVisionConfig,
)
from .conversion.vision_text import from_vision_text_pretrained
from .image_decoding_trips import convert_to_rgb
from .modeling_trips import (
    TripsAnswerRanking,
    TripsForConditionalGeneration,
    TripsForQuestionAnswering,
    TripsModel,
    TripsModelOutput,
    TripsSeq2SeqLMOutput,
)
from .modeling_trips_classification import (
    TripsForImagesAndTextClassification,
    TripsForImagesAndTextClassificationOutput,
)
from .modeling_trips_grounding import TripsForVisualGrounding, TripsVisualGroundingOutput
from .modeling_trips_pretraining import (
    TripsForPreTraining,
    TripsForPreTrainingOutput,
    TripsForRetrieval,
    TripsMatchingOutput,
    TripsRetrievalOutput,
)
from .modeling_trips_text import TripsDecoder, TripsFusionModel, TripsTextModel
from .modeling_trips_vision import (
    TripsImageCache,
    TripsPreTrainedModel,
    TripsSelection,
    TripsSingleStreamModel,
    TripsSingleStreamModelOutput,
    TripsVisionModel,
    TripsVisionModelOutput,
)
from .pipeline_trips import TripsImageToTextPipeline, TripsVisualQuestionAnsweringPipeline
from .pipeline_trips_retrieval import TripsZeroShotImageClassificationPipeline
from .processing_trips import TripsProcessor
from .registration_trips import register


__version__ = "0.2.0.dev0"

register()

__all__ = [
    "__version__",
    "LayerSelection",
    "SelectionSchedule",
    "TripsAnswerRanking",
    "TripsConfig",
    "TripsDecoder",
    "TripsDecoderConfig",
    "TripsForConditionalGeneration",
    "TripsForImagesAndTextClassification",
    "TripsForImagesAndTextClassificationOutput",
    "TripsForPreTraining",
    "TripsForPreTrainingOutput",
    "TripsForQuestionAnswering",
    "TripsForRetrieval",
    "TripsForVisualGrounding",
    "TripsFusionConfig",
    "TripsFusionModel",
    "TripsImageCache",
    "TripsImageToTextPipeline",
    "TripsMatchingOutput",
    "TripsModel",
    "TripsModelOutput",
    "TripsPreTrainedModel",
    "TripsProcessor",
    "TripsRetrievalOutput",
    "TripsSelection",
    "TripsSeq2SeqLMOutput",
    "TripsSingleStreamModel",
    "TripsSingleStreamModelOutput",
    "TripsTextConfig",
    "TripsTextModel",
    "TripsVisionConfig",
    "TripsVisionModel",
    "TripsVisionModelOutput",
    "TripsVisualGroundingOutput",
    "TripsVisualQuestionAnsweringPipeline",
    "TripsZeroShotImageClassificationPipeline",
    "convert_to_rgb",
    "UNPRUNED",
    "from_vision_text_pretrained",
]
