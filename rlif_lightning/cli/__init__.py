"""Settings from the command line and from recipes, and what is wrong with them."""
