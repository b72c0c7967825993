"""Checkpoints to and from PyTorch. The only room that may import torch, and only when asked for it."""
