"""Experts larger than memory: which are held, how they are read, and how llama.cpp is made to wait for them."""
