"""Text in, text out: knows no llama.cpp."""
