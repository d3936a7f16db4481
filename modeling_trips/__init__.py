"""TRIPS for Transformers: vision-language models whose text selects the image patches worth computing."""

# ruff: noqa: F403
from .configuration_trips import *
from .conversion.vision_text import from_vision_text_pretrained as from_vision_text_pretrained
from .image_decoding_trips import convert_to_rgb as convert_to_rgb
from .modeling_trips import *
from .modeling_trips_classification import *
from .modeling_trips_grounding import *
from .modeling_trips_pretraining import *
from .modeling_trips_text import *
from .modeling_trips_vision import *
from .pipeline_trips import *
from .pipeline_trips_retrieval import *
from .processing_trips import *
from .registration_trips import register


__version__ = "0.2.0.dev0"

register()
