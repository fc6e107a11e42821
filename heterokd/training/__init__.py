"""Train one student, in plain PyTorch."""
