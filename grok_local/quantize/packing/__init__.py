"""From the release's numbers to packed rows."""
