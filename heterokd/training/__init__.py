"""Train a student in plain PyTorch."""
