"""Packs a release while it is downloaded: each file as it arrives, and then it may go."""
