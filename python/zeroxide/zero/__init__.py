"""Partitioned training state: units, where their bytes are, and the hooks that bring them where they are used."""
