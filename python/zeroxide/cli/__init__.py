"""The `zeroxide` command. One file per command; what some are made of lies in folders beside them.

Nothing heavy is imported until a command needs it, so `zeroxide --help` answers at once and a wrong option costs no
start of torch. Everything a user can get wrong ends as one line, `zeroxide: error: ...`, with exit status 2; a run
that failed by itself (I/O, numerics) ends the same way with status 1. A traceback means a defect of zeroxide.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from zeroxide.cli.bench import bench
from zeroxide.cli.completion import completion
from zeroxide.cli.config import config
from zeroxide.cli.convert import convert
from zeroxide.cli.doctor import doctor
from zeroxide.cli.plan import plan
from zeroxide.cli.report import report
from zeroxide.cli.run import run
from zeroxide.cli.train import train
from zeroxide.errors import ZeroxideError

__all__ = ["application", "main"]

_USAGE = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def application() -> typer.Typer:
    """The command with all of its own."""
    made = typer.Typer(
        name="zeroxide",
        help="Train PyTorch models whose state does not fit, under a byte budget.",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    made.command()(train)
    made.add_typer(config, name="config")
    made.command()(plan)
    made.command()(doctor)
    made.command()(bench)
    made.command()(completion)
    made.command()(convert)
    made.command()(report)
    # What follows the script is the script's.
    made.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(run)
    return made


def _fail(message: str, status: int) -> int:
    print(f"zeroxide: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: the process's own) and return its exit status."""
    command = typer.main.get_command(application())
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = command.main(given, prog_name="zeroxide", standalone_mode=False)
    except ZeroxideError as error:
        return _fail(error.message, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; the last checkpoint, if there is one, is intact", _INTERRUPTED)
    except BrokenPipeError:
        return 1
    except Exception as error:
        # What typer raises for an unknown option or a value of the wrong type; its class moved between releases.
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        text = str(describe())
        return _fail(text, _USAGE) if text else _USAGE
    return status if isinstance(status, int) else 0
