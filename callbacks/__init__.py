"""Lightning callbacks: rollouts, evaluation, samples, checkpoints."""
