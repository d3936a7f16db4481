"""Metrics of the tasks. Three of them are scripts of `evaluate`, which loads them by their path."""

from pathlib import Path


CAPTION_METRICS, GROUNDING_ACCURACY, VQA_ACCURACY = (
    str(Path(__file__).with_name(f"{name}.py")) for name in ("caption_metrics", "grounding_accuracy", "vqa_accuracy")
)
