"""Numbers from tensors: torch only, pure."""
