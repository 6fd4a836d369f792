"""The engine in another process, and other machines."""
