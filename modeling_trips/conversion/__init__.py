"""Weights of other models as checkpoints of TRIPS: ALBEF's and BLIP's files, ViLT, towers that were trained apart."""

from .albef import ALBEF_TASKS, AlbefDepths, albef_plan
from .blip import blip_plan, check_blip_architecture
from .rules import ConversionError, ConversionPlan, ConversionReport, Rule, load_converted, make_converted
from .vilt import vilt_plan
from .vision_text import from_vision_text_pretrained, load_vision_text


__all__ = [
    "ALBEF_TASKS",
    "AlbefDepths",
    "ConversionError",
    "ConversionPlan",
    "ConversionReport",
    "Rule",
    "albef_plan",
    "blip_plan",
    "check_blip_architecture",
    "from_vision_text_pretrained",
    "load_converted",
    "load_vision_text",
    "make_converted",
    "vilt_plan",
]
