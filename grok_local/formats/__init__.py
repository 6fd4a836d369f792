"""Reads files without trusting them: GGUF headers, the releases' pickles and safetensors."""
