"""Parameters whose values are elsewhere: what they say of themselves, and what operations do with them meanwhile."""
