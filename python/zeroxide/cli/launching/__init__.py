"""What `zeroxide run` knows of several hosts."""
