"""Real models in place of the toy: what ran, and how it is run again; docs/real-models.md has the results."""
