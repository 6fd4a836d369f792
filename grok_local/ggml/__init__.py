"""The C libraries, the one place that touches ctypes: what llama-cpp-python leaves out of its API.

The libraries come with the pinned llama-cpp-python and are loaded without importing that package, which takes a second.
C functions release the GIL.
"""
