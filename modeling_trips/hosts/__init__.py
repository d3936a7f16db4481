"""Patch selection inside models as they are: ViLT, BLIP, BridgeTower, CLIP, SigLIP, timm's VisionTransformer."""

from .apply import apply_patch_selection, record_patch_selection, remove_patch_selection


__all__ = ["apply_patch_selection", "record_patch_selection", "remove_patch_selection"]
