"""The command line. A user's error is one line on stderr and an exit status; a traceback is a defect of kogc.

Exit status: 0 done, 1 cannot be done, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import importlib
import io
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
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            return error.exit_code
        except click.ClickException as error:
            return _complain(error.format_message(), error.exit_code)
        except (Interrupted, click.Abort, KeyboardInterrupt):
            return _complain("interrupted", INTERRUPTED)
        except MemoryError:
            return _complain("out of memory", 1)
        except BrokenPipeError:
            _forget_output()
            return 1  # the reader went away (`| head`): nothing to say
        except OSError as error:
            if error.filename is None:
                _forget_output()
            what = error.strerror or str(error)
            return _complain(what if error.filename is None else f"{error.filename}: {what}", 1)


def _forget_output() -> None:
    """What stdout did not take is not to be flushed at exit again."""
    with contextlib.suppress(OSError):  # it may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str, status: int) -> int:
    click.echo(f"kogc: {' '.join(message.split())}", err=True)
    return status


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="kogc", message="%(prog)s %(version)s")
def cli() -> None:
    """Compile a model for one GPU (or this CPU), and decode with it at the speed of memory."""


def main() -> None:
    """Entry point of the `kogc` command."""
    _open_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, _terminate)
    try:
        cli.main()
    except SystemExit as end:
        # A compile that Ctrl-C left behind runs in a thread; a normal exit would take its library away under it.
        if end.code == INTERRUPTED and threading.active_count() > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


def _open_streams() -> None:
    """Streams that were closed are empty ones; a character that a terminal's encoding lacks is written as an escape."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 # for as long as the process runs
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP clean up as Ctrl-C does."""
    raise KeyboardInterrupt
