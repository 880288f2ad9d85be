"""Fixtures that several files of this folder share."""

from saving import make, saved

__all__ = ["make", "saved"]
