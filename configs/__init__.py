"""Shipped recipes: one readable YAML each."""
