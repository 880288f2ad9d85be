"""Libraries that say and ask things on the terminal, while a model is looked at."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator

__all__ = ["quiet"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what is said (log lines, warnings, prints) off the terminal, and the terminal from what is asked.

    transformers asks whether a model's own Python may run, also for a model inside another, where a caller's answer
    does not reach. At the end of input it takes no for an answer.
    """
    previous, typed = logging.root.manager.disable, sys.stdin
    said = io.StringIO()
    logging.disable(logging.ERROR)
    sys.stdin = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdin = typed
        logging.disable(previous)
