"""Training methods: what to do to a model or a small module so that a mechanism works."""
