"""Ways of spreading a model over ranks beside its state: one package each."""

from __future__ import annotations
