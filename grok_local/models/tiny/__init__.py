"""The built-in model's checkpoint: Grok-1 in miniature, in the release's format. `training/` makes it."""
