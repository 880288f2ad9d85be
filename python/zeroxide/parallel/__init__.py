"""Ways to spread one model over ranks beside its data: one folder each."""
