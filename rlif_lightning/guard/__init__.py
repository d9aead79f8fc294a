"""When has training begun to collapse? A rule over signals that need no labels, and the weights to go back to."""
