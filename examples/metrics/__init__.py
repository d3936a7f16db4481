"""Metrics of the tasks. Three of them are modules of `evaluate`."""
