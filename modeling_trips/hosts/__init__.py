"""Patch selection inside models of other libraries: vision towers, encoders, generative vision-language models."""

from .apply import apply_patch_selection, record_patch_selection, remove_patch_selection
from .vlm.guide import TextGuide
from .vlm.pruning import prune_inputs


__all__ = ["TextGuide", "apply_patch_selection", "prune_inputs", "record_patch_selection", "remove_patch_selection"]
