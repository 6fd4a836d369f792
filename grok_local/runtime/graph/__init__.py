"""What looks on, and steps in, while llama.cpp computes its graph."""
