"""`python -m grok_local` is `grok-local`. Ctrl-C while everything is imported is a Ctrl-C like any other."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line."""
    try:
        from grok_local import cli
    except KeyboardInterrupt:
        os._exit(130)
    cli.main()


if __name__ == "__main__":
    main()
