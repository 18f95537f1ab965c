"""Change a model's attention while it runs."""
