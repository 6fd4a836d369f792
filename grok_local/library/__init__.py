"""Names to files: models, checkpoints, the built-in model."""
