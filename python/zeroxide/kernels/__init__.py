"""CUDA kernels, one file a family: a typed wrapper of each and what torch makes of the same.

A wrapper takes a `Launcher` and tensors of whatever memory that launcher's kernels can reach.
"""

from zeroxide.kernels.launch import Kernel, Launcher

__all__ = ["Kernel", "Launcher"]
