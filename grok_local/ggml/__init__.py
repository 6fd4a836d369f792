"""The one place that touches ctypes: what llama-cpp-python leaves out of its API.

The libraries come with the pinned llama-cpp-python and are loaded without importing that package, which takes a second.
C functions release the GIL.
"""

from grok_local.ggml.library import exit_on_abort
from grok_local.ggml.packing import bytes_per_row, dequantize, quantize_rows

__all__ = ["bytes_per_row", "dequantize", "exit_on_abort", "quantize_rows"]
