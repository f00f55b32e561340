"""What all commands share: each error of a user becomes one line on stderr and an exit code."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any

import click

from gguf_run.formats.errors import GgufRunError, OptionError
from gguf_run.runtime.terminal.text import message

# Exit codes. 0 means that all went well.
FAILED = 1  # bad input, a file or network error, out of memory, a closed or full stdout
WRONG_USAGE = 2  # of the command line; an option's value that is not allowed
INTERRUPTED = 130  # by Ctrl-C
BROKEN_PIPE = 141  # the reader of stdout went away (`| head`): nothing is printed, as in other filters


class Command(click.Command):
    """A click command that shows any error as one line. It has our help, with examples, and completion in shells."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.examples = examples

    def get_help(self, ctx: click.Context) -> str:
        from gguf_run.runtime.cli.help import help_text

        return help_text(self, ctx)

    def main(self, *args: Any, **extra: Any) -> Any:
        if any(name.startswith("_GGUF_") and name.endswith("_COMPLETE") for name in os.environ):
            from gguf_run.runtime.cli.help import complete_in_bash

            complete_in_bash()
        return super().main(*args, **extra)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except KeyboardInterrupt:  # click would say "Aborted!" and exit with FAILED
            raise click.exceptions.Exit(INTERRUPTED) from None

    def invoke(self, ctx: click.Context) -> Any:
        with _plain_warnings(), _one_line_errors(ctx):
            if sys.stdout is None:
                raise GgufRunError("stdout is closed: there is nowhere to write to")
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, TextIOWrapper):
                    stream.reconfigure(errors="replace")  # a question mark for what the terminal cannot show
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
    """Return a decorator that makes a function one of our tools, with -h and --version.

    params: parameters of the command, before those that click's decorators add.
    examples: command lines for --help.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        settings = {"help_option_names": ["-h", "--help"], "show_default": True}
        command = click.command(name, cls, params=[*params], examples=examples, context_settings=settings)(function)
        return click.version_option(package_name="gguf-run", prog_name=name)(command)

    return decorate


@contextmanager
def _one_line_errors(ctx: click.Context) -> Iterator[None]:
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
        if ctx.params.get("verbose"):
            traceback.print_exc()
        # Printed text comes before the error; a stdout that fails is dropped, or it would fail again at exit.
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            _drop_stdout()
        from gguf_run.runtime.cli.describe import describe

        message(f"error: {describe(error)}")
        ctx.exit(WRONG_USAGE if isinstance(error, OptionError) else FAILED)


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


def _drop_stdout() -> None:
    """Redirect a broken stdout to nowhere: its buffer cannot fail again at exit."""
    with suppress(OSError, ValueError):  # a test's stdout has no file descriptor
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
