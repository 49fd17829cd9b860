"""Cost of one training step: the optimizer, its hooks, its state, at the shapes of large models."""
