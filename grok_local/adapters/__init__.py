"""Where other programs meet ours: lm-evaluation-harness and llm use models, Ray runs them. None is a dependency."""
