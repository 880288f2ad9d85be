"""A device that is one to PyTorch and is no GPU: see `device.py`. For tests only."""
