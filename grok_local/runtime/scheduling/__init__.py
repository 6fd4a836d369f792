"""Many sequences on one engine: which of them are evaluated next, and what becomes of each."""
