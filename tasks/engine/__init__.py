"""The training engine: knows losses["loss"] and nothing else of a family."""
