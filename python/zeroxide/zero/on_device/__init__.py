"""Units that are at home on the device that computes, with weights, optimizer state and gradients."""
