"""The commands, one short function each; `cli` puts them together."""
