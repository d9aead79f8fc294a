"""What completions say before any training: statistics with intervals, how alike rewards are, a verdict."""
