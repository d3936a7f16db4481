"""Metrics of the tasks. `evaluate` loads three of them by path."""

from pathlib import Path


CAPTION_METRICS, GROUNDING_ACCURACY, VQA_ACCURACY = (
    str(Path(__file__).with_name(f"{name}.py")) for name in ("caption_metrics", "grounding_accuracy", "vqa_accuracy")
)
