"""Figures of kept patches, diagnostics of the selection, and its cost against the unpruned baseline."""

from .diagnostics import (
    image_sensitivity,
    kept_coverage,
    kept_patches,
    patch_precision,
    region_recall,
    score_entropy,
    text_sensitivity,
)
from .pictures import draw_kept_patches, plot_selection
from .provenance import provenance


__all__ = [
    "draw_kept_patches",
    "image_sensitivity",
    "kept_coverage",
    "kept_patches",
    "plot_selection",
    "provenance",
    "score_entropy",
    "patch_precision",
    "region_recall",
    "text_sensitivity",
]
