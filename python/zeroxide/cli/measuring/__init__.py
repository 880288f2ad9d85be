"""What `zeroxide bench` is made of: a process that trains a small model, and one that updates parameters."""
