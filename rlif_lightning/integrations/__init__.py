"""Use from elsewhere: scores of any completions, and the rewards and the guard inside TRL."""
