"""`deepspeed.initialize` and `deepspeed.zero.Init`: zeroxide's, after a process group has been made.

Libraries count on one from then on, also where there is one rank.
"""

from __future__ import annotations

import functools
from typing import Any

from zeroxide.distributed import init_distributed
from zeroxide.engine.entry import initialize as initialize_engine
from zeroxide.zero import Init as ZeroInit

__all__ = ["Init", "initialize"]


@functools.wraps(initialize_engine)
def initialize(*args: Any, **kwargs: Any) -> Any:
    """See `zeroxide.initialize`. Makes torch's default process group where there is none, also for one rank."""
    init_distributed(distributed_port=kwargs.get("distributed_port", 29500), verbose=False)
    return initialize_engine(*args, **kwargs)


class Init(ZeroInit):
    """See `zeroxide.zero.Init`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        init_distributed(verbose=False)
        super().__init__(*args, **kwargs)
