"""Weights where and when they are used, from host memory, disk and other ranks."""
