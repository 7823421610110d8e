"""The one training loop, its timeline, loader, optimizers and checkpoints."""
