"""A checkpoint -> a GGUF: readers, recipe, packing, journal, verify."""
