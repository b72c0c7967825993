"""From annotated medical images to batches: sources, records, prompts, loader. NumPy only; it never imports jax."""
