"""Where compute memory is, and how the core finds it."""
