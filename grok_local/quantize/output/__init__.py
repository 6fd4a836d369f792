"""The files being written: parts, journal, and how they get their names."""
