"""Memory of a recipe, before anything is loaded: ``rlif plan``."""
