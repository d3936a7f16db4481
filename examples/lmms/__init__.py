"""Vision-language models for evaluations."""
