"""Runs: their options, models, trainers, and what guards them."""
