"""A GGUF -> text: engine, sampling, chat."""
