"""Many tasks at once: lines of files, each with a result of its own."""
