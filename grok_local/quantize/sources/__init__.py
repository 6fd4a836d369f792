"""What a release looks like on disk: its tensors and its vocabulary."""
