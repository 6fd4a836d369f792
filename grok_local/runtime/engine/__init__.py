"""llama.cpp opened as planned, and used."""
