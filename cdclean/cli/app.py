"""The application: its name, its help, the order of its commands, and what several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup, TyperOption

from cdclean import __version__
from cdclean.console import Console

# As they are used; help lists them so.
_ORDER = ["scan", "filter", "report", "bias", "evaluate", "status", "show", "train", "demo"]


class _Commands(TyperGroup):
    """Leaves the variable of every option out of the help texts, which it would double; the epilog has the rule."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        for parameter in command.params if command else ():
            if isinstance(parameter, TyperOption):
                parameter.show_envvar = False
        return command

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=_ORDER.index)


app = typer.Typer(
    name="cdclean",
    cls=_Commands,
    help="Find backdoored images in a training set, and write a clean copy of it.",
    epilog="Start with:  cdclean demo\n\nEvery option is a variable too: scan --chunk-size is CDCLEAN_SCAN_CHUNK_SIZE.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "CDCLEAN"},
)


def chosen_run(run: str | None, console: Console, *, complete: bool = True) -> Any:
    """The run that was named, or the newest one here, which is then said."""
    from cdclean import records, storage

    if run is not None:
        return storage.locate(run)
    newest = records.newest_run(Path(), complete=complete)
    console.say(f"run: {storage.to_text(newest)}")
    return newest


def _version(value: bool) -> None:
    if value:
        Console().result(f"cdclean {__version__}", {})
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_version, is_eager=True, allow_from_autoenv=False
        ),
    ] = False,
) -> None:
    pass
