"""Which samples of a data set are a rank's own."""
