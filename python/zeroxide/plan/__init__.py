"""What a model's units are, where their bytes are at home, and what a step exchanges."""
