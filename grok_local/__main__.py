"""`python -m grok_local` is `grok-local`."""

from grok_local.cli import main

main()
