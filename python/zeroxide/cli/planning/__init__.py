"""What `zeroxide plan` is made of: measurements of this machine, a rehearsed pass, and options side by side."""
