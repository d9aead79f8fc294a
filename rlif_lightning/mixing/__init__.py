"""Weights between two models, and what was measured of them."""
