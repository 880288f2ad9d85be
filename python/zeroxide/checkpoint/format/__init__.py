"""What the files of a checkpoint look like, and how they become one by a rename."""
