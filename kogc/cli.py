"""The command line. A user's error is one line on stderr and an exit status; a traceback is a defect of kogc.

Exit status: 0 done, 1 cannot be done, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import click

from . import __version__
from .errors import KogcError

COMMANDS = (
    "build",
    "plan",
    "run",
    "bench",
    "eval",
    "tune",
    "inspect",
    "verify",
    "doctor",
    "models",
    "gpus",
    "profile",
    "spec",
)
INTERRUPTED = 130


class Interrupted(Exception):
    """Ctrl-C, under a name that click does not print an empty line for."""


class Commands(click.Group):
    """Loads a command's module when it is asked for, and turns errors into one line and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".commands.{cmd_name}", __package__)
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run and exit, whatever happens."""
        sys.exit(self._status(*args, **{**extra, "prog_name": "kogc", "standalone_mode": False}))

    def _status(self, *args: Any, **extra: Any) -> int:
        try:
            answer = super().main(*args, **extra)
            sys.stdout.flush()
            return answer if isinstance(answer, int) else 0
        except KogcError as error:
            return _complain(str(error), error.exit_status)
        except click.ClickException as error:
            return _complain(error.format_message(), error.exit_code)
        except (Interrupted, click.Abort, KeyboardInterrupt):
            return _complain("interrupted", INTERRUPTED)
        except MemoryError:
            return _complain("out of memory", 1)
        except BrokenPipeError:
            # The reader went away (`| head`): nothing to say, and nothing left to flush at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1


def _complain(message: str, status: int) -> int:
    click.echo(f"kogc: {' '.join(message.split())}", err=True)
    return status


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="kogc", message="%(prog)s %(version)s")
def cli() -> None:
    """Compile a model for one GPU (or this CPU), and decode with it at the speed of memory."""


def main() -> None:
    """Entry point of the `kogc` command."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        cli.main()
    except SystemExit as end:
        # A compile that Ctrl-C left behind runs in a thread; a normal exit would take its library away under it.
        if end.code == INTERRUPTED and threading.active_count() > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM cleans up as Ctrl-C does."""
    raise KeyboardInterrupt
