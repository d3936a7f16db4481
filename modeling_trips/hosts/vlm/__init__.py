"""Patch selection in generative vision-language models, inside the vision tower and after it."""
