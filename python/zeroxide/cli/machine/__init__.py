"""What `zeroxide doctor` looks at, one file each. A look gives `Finding`s, and raises nothing that is the machine's."""
