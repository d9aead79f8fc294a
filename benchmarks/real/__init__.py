"""Real models in place of the toy: what ran, and how it is run again; docs/real-models.md has the results."""

TRAININGS, PRECISIONS = ("full", "lora", "nf4"), ("32-true", "bf16-mixed")
TOKENS = 24  # of a completion
