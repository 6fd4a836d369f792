"""Arithmetic on bytes: what computing takes, and how layers fill rooms."""
