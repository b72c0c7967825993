"""GLIP as Flax Linen modules: Swin, FPN, BERT, the fusion tower and the dense heads."""
