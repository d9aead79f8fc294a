"""Scripts that measure; they run from the repository's root and are not installed."""
