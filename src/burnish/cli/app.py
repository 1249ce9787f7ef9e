"""The typer app, how errors leave it, and where output goes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.syntax import Syntax
from rich.text import Text
from typer.core import TyperGroup

from burnish._text import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

_PLAIN_WIDTH = 100  # of what is piped: rich would take 80, too narrow for a graph's table

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else.")]


class _Commands(TyperGroup):
    """Every error becomes one line on stderr and exit code 2; `--traceback` lets it through."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        rest = (prog_name, complete_var, False, windows_expand_args)
        if not standalone_mode:
            return super().main(args, *rest, **extra)
        try:
            code = super().main(args, *rest, **extra)
        except (KeyboardInterrupt, typer.Abort):
            print("burnish: interrupted", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if "--traceback" in (sys.argv[1:] if args is None else args):
                raise
            print(f"burnish: {one_line(error)}", file=sys.stderr)
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def burnish(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Make PyTorch transformers fast, step by step, and see the work."""
    if version:
        from burnish import __version__

        typer.echo(f"burnish {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """The entry point of the command."""
    # Read when torch is loaded: its profiler otherwise writes two lines to stderr each time it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for where stdout cannot encode a bar
    app(prog_name="burnish")


def one_line(error: BaseException) -> str:
    """The error for people: its message where it was meant for them, else with its type in front."""
    formatted = getattr(error, "format_message", None)  # of the option parser's errors
    text = formatted().replace("Value error, ", "") if formatted is not None else str(error)
    text = text.removeprefix("Invalid value: ")
    if (context := getattr(error, "ctx", None)) is not None:
        text = f"{text.rstrip('.')} (see {context.command_path} --help)"
    text = " ".join(text.split()) or type(error).__name__
    ours = formatted is not None or type(error).__module__.startswith("burnish.")
    return text if ours or isinstance(error, (ValueError, TypeError, OSError)) else f"{type(error).__name__}: {text}"


def _doing(what: str) -> Text:
    return Text(f"{what} ...", style="dim")


class Output:
    """Where one command's results and progress go."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._errors = Console(stderr=True)

    @contextlib.contextmanager
    def working(self, on: str) -> Iterator[Callable[[str], None]]:
        """Shows on a terminal what is being done; the function yielded changes the text.

        Nothing spins: a thread that redraws a dozen times a second would take its time from what is measured meanwhile.
        """
        if self.as_json or not self._errors.is_terminal:
            yield lambda doing: None
            return
        with Live(_doing(on), console=self._errors, auto_refresh=False, transient=True) as line:
            yield lambda doing: line.update(_doing(doing), refresh=True)

    def show(self, *parts: RenderableType) -> None:
        """Prints, in colour on a terminal; nothing under --json. A str is text, not markup."""
        if self.as_json:
            return
        shown = [Text(part) if isinstance(part, str) else part for part in parts]
        if sys.stdout.isatty():
            Console(highlight=False).print(*shown, sep="\n")
        else:
            print(plain(*shown, width=_PLAIN_WIDTH))

    def show_python(self, source: str) -> None:
        """Prints code: in colour on a terminal, as it is elsewhere, long lines unbroken."""
        if sys.stdout.isatty():
            self.show(Syntax(source.strip(), "python", theme="ansi_dark", background_color="default", word_wrap=True))
        elif not self.as_json:
            print(source.strip())

    def data(self, value: Any) -> None:
        """Prints JSON under --json, else nothing."""
        if self.as_json:
            print(json.dumps(value, indent=2, default=str))
