"""What the output has where, before its first byte is packed."""
