"""Full values of an engine's parameters, gradients and optimizer state, in and out."""
