"""Load, export, register and promote students."""
