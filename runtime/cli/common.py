"""What all commands share: every error that a user can meet becomes one line on stderr and the right exit code.

exit code  when
0          all went well
1          `error: ...`: bad input, a file or network error, out of memory, a closed or full stdout
2          wrong usage of the command line, an option's value that is not allowed
130        interrupted with Ctrl-C
141        the reader of stdout went away (`| head`): nothing is printed, as in other filters
"""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime.terminal.text import message

FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


class Command(click.Command):
    """A click command that ends with one line on any error.

    It has our help, with its own examples, and completes values in shells. It does not start where stdout is closed.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = examples

    def get_help(self, ctx: click.Context) -> str:
        from gguf_run.runtime.cli.help import help_text

        return help_text(self, ctx)

    def main(self, *args: Any, **extra: Any) -> Any:
        if any(name.startswith("_GGUF_") and name.endswith("_COMPLETE") for name in os.environ):
            from gguf_run.runtime.cli.shells import complete_in_bash

            complete_in_bash()
        return super().main(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        verbose = bool(ctx.params.get("verbose"))
        with _plain_warnings(), _one_line_errors(ctx, verbose):
            if sys.stdout is None:
                raise GgufRunError("stdout is closed: there is nowhere to write to")
            _never_fail_to_encode()
            result = super().invoke(ctx)
            # A full disk or a reader that went away must show here, not while the interpreter shuts down.
            sys.stdout.flush()
            return result


class Group(Command, click.Group):
    """A click group whose subcommands are of the class Command."""

    command_class = Command


def tool(
    name: str, cls: type[Command] = Command, params: Sequence[click.Parameter] = (), examples: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Make a function a tool of ours, with -h and --version. params: in front of those that click's decorators add."""

    def decorate(function: Callable[..., Any]) -> Any:
        settings = {"help_option_names": ["-h", "--help"], "show_default": True}
        command = click.command(name, cls, params=[*params], examples=examples, context_settings=settings)(function)
        return click.version_option(package_name="gguf-run", prog_name=name)(command)

    return decorate


@contextmanager
def _one_line_errors(ctx: click.Context, verbose: bool) -> Iterator[None]:
    try:
        yield
    except (click.ClickException, click.exceptions.Exit):
        raise
    except KeyboardInterrupt:
        click.echo(err=True)
        ctx.exit(INTERRUPTED)
    except BrokenPipeError:
        _drop_stdout()
        ctx.exit(BROKEN_PIPE)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        # Printed text comes before the error; a stdout that fails is dropped, or it would fail again at exit.
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            _drop_stdout()
        message(f"error: {describe(error)}")
        ctx.exit(WRONG_USAGE if isinstance(error, OptionError) else FAILED)


def describe(error: Exception) -> str:
    """Return what went wrong, for the line that a user sees."""
    if isinstance(error, GgufRunError):
        return str(error)
    if isinstance(error, MemoryError) or str(error) == "can't start new thread":
        detail = f" ({error})" if str(error) else ""
        return f"out of memory{detail}: choose a smaller model or context, or close other programs"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if isinstance(error, OSError):
        return str(error) or type(error).__name__
    # A bug of ours: still one line. Commands with --verbose show the traceback.
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"internal error, please report it: {type(error).__name__}: {error} ({place})"


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings to the user as one line each, and hide those that are meant for programmers."""

    def show(text: Warning | str, category: type[Warning], *_: Any) -> None:
        message(f"warning: {text}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _never_fail_to_encode() -> None:
    """Write a question mark for a character that the terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _drop_stdout() -> None:
    """Redirect a broken stdout to nowhere: its buffer cannot fail again at exit."""
    with suppress(OSError, ValueError):  # a test's stdout has no file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
