"""Training runs: options, models, trainers and callbacks."""
