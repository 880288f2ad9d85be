"""zeroxide under the names that other libraries look for."""
