"""The built-in model: Grok-1 in miniature, trained to explain this program. `training/` makes it."""

from pathlib import Path

__all__ = ["CHECKPOINT"]

CHECKPOINT = Path(__file__).parent
