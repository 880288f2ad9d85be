"""Whether all ranks still live: connections between them, what each is doing, and how a failure is detected."""
