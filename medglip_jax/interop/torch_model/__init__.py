"""The detector in plain PyTorch: files that an export folder carries, so that it runs where JAX is not installed."""
