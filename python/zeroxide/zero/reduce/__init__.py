"""Gradients from autograd into the core, small where they would be large."""
