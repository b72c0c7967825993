"""Training: state, optimizer, the step, checkpoints and what is logged."""
