"""Reads files without trusting them: GGUF headers, the release's pickles."""
