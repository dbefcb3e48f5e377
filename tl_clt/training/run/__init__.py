"""A training run: its config, its loop, its checkpoints, its record."""
