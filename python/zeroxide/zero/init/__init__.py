"""Parameters and their values before there is an engine."""
