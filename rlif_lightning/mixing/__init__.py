"""Weights between two models, and what was measured on them."""
