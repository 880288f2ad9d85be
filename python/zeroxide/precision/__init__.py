"""What forward computes in, the scale of an fp16 loss, and the conversions between dtypes that are allowed."""
