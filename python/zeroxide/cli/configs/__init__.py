"""What `zeroxide config check` is made of: the config alone, and the plan for a model that is known by its shapes."""
