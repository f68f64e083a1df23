"""The command line. Data goes to stdout, progress to stderr; exit codes: 0 ok, 1 runtime, 2 usage, 130 Ctrl-C."""

from __future__ import annotations

import ast
import sys
import warnings
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from inspect import isfunction
from pathlib import Path

from cyclopts import App

from lens_core import __version__, plugin_files
from lens_core.catalog import Catalog, resolve
from lens_core.cli import terminal
from lens_core.cli.bench import bench, compare
from lens_core.cli.generate import generate
from lens_core.cli.options import CORE_COMMANDS
from lens_core.cli.plugins import plugins
from lens_core.cli.share import check, lora, push
from lens_core.cli.train import train
from lens_core.io import readers
from lens_core.types import LensError, NumericalError, PluginError

app = App(
    name="lens",
    version=__version__,
    help="Text-to-image: generate, train, measure. Everything is a plugin.",
    help_epilogue="To use components from a Python file: lens --plugin FILE.py COMMAND …",
)
for _command in (generate, train, bench, compare, check, push, lora, plugins):
    app.command(_command)


def mount(catalog: Catalog, called: str | None = None) -> dict[str, str]:
    """Add the plugins' commands to `app` and return them: name -> module:function, imported when the command runs.

    With `called`, the first word of the command line, commands that a plugin adds to another plugin's group are added
    to the group of that name alone, for to add them imports the group."""
    commands = catalog.commands(taken=CORE_COMMANDS)
    for name, place in sorted(commands.items(), key=lambda item: " " in item[0]):  # groups before what stands in them
        if not _module_exists(place.partition(":")[0]):
            continue  # cyclopts would raise, even for another command; `main` reports what is missing
        group, _, last = name.rpartition(" ")  # "bench train" stands under a command that is here already
        if group and group not in CORE_COMMANDS and (group not in commands or called not in (None, group)):
            continue
        parent = app[group] if group else app
        if last not in parent:
            module, _, attribute = place.partition(":")
            if group and group == called:
                with suppress(ImportError):  # its group has been imported as well, so help may tell what it does
                    import_module(module)
            ready = getattr(sys.modules.get(module), attribute, None)
            if isfunction(ready):
                parent.command(ready, name=last)
            else:  # of the command that runs, the whole help; of others the line that stands in a list
                parent.command(place, name=last, help=None if last == called else _description(module, attribute))
    return commands


def _description(module: str, attribute: str) -> str | None:
    """The first paragraph of a command's docstring, or the `help` of its cyclopts App, read without importing it."""
    try:
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_bytes())
    except Exception:  # whoever runs the command gets the error
        return None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            return " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split()) or None
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            texts = [
                k.value.value for k in node.value.keywords if k.arg == "help" and isinstance(k.value, ast.Constant)
            ]
            if attribute in names and texts:
                return str(texts[0])
    return None


def _module_exists(module: str) -> bool:
    """Whether there is such a module; it is not imported."""
    try:
        return module in sys.modules or find_spec(module) is not None
    except (ImportError, ValueError):  # its package is missing, or fails
        return False


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code. Every error is one line on stderr, after its traceback with
    LENS_DEBUG=1 in the environment."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    terminal.escape_unprintable()
    warnings.showwarning = lambda message, *_: terminal.print_error(readers.one_line(message, 1000))
    try:
        terminal.check_arguments(words)
        plugin_files.add_to_environment(terminal.take_option(words, "--plugin"))
        if (
            not words or words[0] not in CORE_COMMANDS or words[0] == "bench"
        ):  # a plugin's command, or help, which lists them
            commands = mount(Catalog.installed(), words[0] if words else "")
            place = commands.get(" ".join(words[:2])) or commands.get(words[0] if words else "")
            if place is not None:
                resolve(place)  # before cyclopts does, whose error would not name the plugin
        code = app(words, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # whoever reads has read enough, as `head` does
        terminal.discard_output()
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else terminal.report_error(stop, 1)
    except KeyboardInterrupt:
        return 130
    except BaseException as error:  # a panic of a Rust library is no Exception
        usage = isinstance(error, LensError) and not isinstance(error, NumericalError | PluginError)
        return terminal.report_error(error, 2 if usage else 1)


if __name__ == "__main__":
    sys.exit(main())
