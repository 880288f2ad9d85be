"""Whether all ranks still live: connections between them, what each is doing, and who judges."""
