"""Ways of cutting a model over ranks that take the same samples."""
