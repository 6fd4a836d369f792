"""The scheduler behind HTTP: OpenAI's API for models that take their time."""
