"""What each Grok is: facts, as frozen dataclasses. One file per model, named as its release is."""
