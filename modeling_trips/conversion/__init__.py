"""Conversion of other models to TRIPS: ALBEF, BLIP, ViLT, and pairs of a vision tower and a text encoder."""

from .albef import albef_plan
from .blip import blip_plan
from .rules import ConversionError, ConversionPlan, ConversionReport, Rule, load_converted, make_converted
from .vilt import vilt_plan
from .vision_text import from_vision_text_pretrained


__all__ = [
    "ConversionError",
    "ConversionPlan",
    "ConversionReport",
    "Rule",
    "albef_plan",
    "blip_plan",
    "from_vision_text_pretrained",
    "load_converted",
    "make_converted",
    "vilt_plan",
]
