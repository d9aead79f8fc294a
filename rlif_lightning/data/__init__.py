"""Problems, prompts, and how they are dealt into batches."""
