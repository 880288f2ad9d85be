"""Keeps torch.compile out of what an engine does between operations.

Hooks bring weights and take them away in each call; traced, they would do so once, while a graph is made.
"""

from __future__ import annotations

import sys

__all__ = ["leave_untraced"]

_told = False


def leave_untraced() -> None:
    """Tells torch.compile, where it is in use, that no function of zeroxide is to be compiled: graphs end there."""
    global _told
    # It is large, and imported by the first call of torch.compile.
    if not _told and "torch._dynamo.trace_rules" in sys.modules:
        from torch._dynamo import trace_rules

        trace_rules.add("zeroxide")
        _told = True
