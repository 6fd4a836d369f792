"""What other programs use models by: EleutherAI's lm-evaluation-harness, and llm. None of them is a dependency."""
