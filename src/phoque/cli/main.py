"""The root command: a lazy table, so that `phoque --help` imports neither torch nor any command's module."""

import atexit
import gc
import importlib
import os
import sys
from contextlib import suppress
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from phoque.errors import INTERRUPTED, UsageError, suggest, to_phoque_error
from phoque.settings.environment import let_threads_sleep
from phoque.version import __version__

COMMANDS = {
    "train": "Fine-tune a chat model into a persona, from a dataset of conversations.",
    "chat": "Talk to a model: an adapter, a run, a merged model, a GGUF file or an ONNX export.",
    "merge": "Merge an adapter into its base model, and check that the merged model computes the same.",
    "export-onnx": "Export a model for Transformers.js in several precisions, and verify the export.",
    "verify-onnx": "Check whether an export runs in Transformers.js: files, graphs, ONNX Runtime, Node, browser.",
    "export-gguf": "Export a model, or an adapter alone, for llama.cpp and Ollama, and verify the export.",
    "verify-gguf": "Check whether GGUF files run: files, tensors, llama.cpp, Node, browser.",
    "compare-sae": "Show which sparse autoencoder features a fine-tune moved, beyond chance and a control.",
    "jobs": "List the Jobs that phoque submitted with --on; follow, cancel or rerun one, or clean up their inputs.",
    "psm-probe": "Find a persona's direction in a model, test it with controls, measure a fine-tune along it.",
}


class LazyCommands(TyperGroup):
    """A group whose commands are imported when they run, as huggingface_hub's cli does it."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            raise UsageError(
                what=f"There is no command {cmd_name!r}.",
                why=f"The commands are {', '.join(COMMANDS)}.",
                fix="See `phoque --help`, or `phoque COMMAND --help`."
                if cmd_name == "help"
                else suggest(cmd_name, COMMANDS, "See `phoque --help`."),
            )
        if ctx.resilient_parsing:  # shell completion asks for names and summaries only
            return _summary(cmd_name)
        module = importlib.import_module(f"phoque.cli.{cmd_name.replace('-', '_')}")
        return module.command(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _summary(name: str) -> Any:
    """A command that only knows its name and help, for shell completion."""
    app = typer.Typer(rich_markup_mode=None)
    app.command(name, help=COMMANDS[name])(lambda: None)
    return typer.main.get_command(app)


def _print_versions(is_requested: bool) -> None:
    if not is_requested:
        return
    from importlib.metadata import version

    libraries = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "huggingface_hub")
    print(f"phoque {__version__}")
    print(" ".join(f"{name} {version(name)}" for name in libraries))
    raise typer.Exit


app = typer.Typer(
    cls=LazyCommands,
    rich_markup_mode=None,  # rich panels alone take 0.2 s of the 0.3 s that --help may take
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(epilog="Start here: phoque train --preset demo --max-steps 20")
def root(
    version: bool = typer.Option(
        False, "--version", help="Show the versions of phoque and its main libraries.", callback=_print_versions
    ),
) -> None:
    """Fine-tune a small chat model into a persona, measure what changed inside it, and export it."""


# objects between collections; imports create a million that are no garbage, and with Python's 700 walking them takes an
# eighth of the time
GC_THRESHOLD = (10_000, 20, 20)
_exit_code: int | None = None  # of main(), once it has ended


def main() -> None:
    """Run one command; whatever it raises leaves as three lines on stderr and a documented exit code."""
    atexit.register(_end_process)  # first, so that it is called last
    let_threads_sleep()
    gc.set_threshold(*GC_THRESHOLD)
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if code == INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt("Ctrl-C was pressed.")
        _exit(code or 0)
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("PHOQUE_DEBUG", "").lower() not in ("", "0", "false", "no"):
            raise
        from phoque.console import console

        phoque_error = to_phoque_error(error)
        console.error(phoque_error)
        _exit(phoque_error.code)


def _exit(code: int) -> NoReturn:
    global _exit_code
    _exit_code = code
    sys.exit(code)


def _end_process() -> None:
    """End the process after main(), when all other exit functions have been called.

    Python's own clean-up would walk all objects several times, which takes two seconds after training. gc.freeze()
    would avoid that, but then nanobind, which triton uses in torch 2.15, lists all of its types as leaked.
    """
    if _exit_code is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(_exit_code)
