"""Checkpoints of others and model folders, read and written without an engine."""
