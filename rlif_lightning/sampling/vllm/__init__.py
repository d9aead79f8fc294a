"""vLLM as the engine of rollouts."""
