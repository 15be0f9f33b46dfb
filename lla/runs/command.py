"""Command lines: a mistake of the user is one line of text, not a traceback."""

import argparse
import difflib
import importlib
import inspect
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from lla import paths
from lla.runs.config import check_keys
from lla.runs.workdir import WorkdirError, read_config

# What reading a config file, or the overrides of one, may raise.
_ERRORS = (AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError)
_NAME = re.compile(r"(--?config=)(\w+)(:.*)?")
_OVERRIDE = re.compile(r"--?(?:no)?config\.([\w.]+)")


def run(
    main: Callable[[Sequence[str]], None],
    needed: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> None:
    """`absl.app.run` for a program with a config flag named "config".

    `--config=NAME` stands for the file of that name in `lla.configs`, from any folder.

    The program ends with exit status 1 and one line of text if a flag is missing, if an override
    names a key that the config does not have (the line names the nearest key), if the config file
    does not exist or raises ValueError, or if `main` raises `absl.app.UsageError`. Each warning is
    one line.

    Args:
      main: the program; `--help` prints the docstring of its module, and its flags.
      needed: flags without which the program cannot do anything -> boolean flags, each of which
        makes do without them.
    """

    def checked(argv):
        try:
            for name, instead in needed.items():
                if flags.FLAGS[name].value is None and not any(
                    flags.FLAGS[i].value for i in instead
                ):
                    raise app.UsageError(f"--{name} is needed: {flags.FLAGS[name].help}")
            main(argv)
            sys.stdout.flush()
        except app.UsageError as error:
            sys.stderr.write(f"FATAL {error}\n")
            sys.exit(error.exitcode or 1)
        except BrokenPipeError:  # such as `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    if {"--help", "-help", "-h"} & set(sys.argv[1:]):
        script = main.__module__ == "__main__"
        of_flags = flags.FLAGS.main_module_help if script else flags.FLAGS.module_help
        print(inspect.getdoc(sys.modules[main.__module__]), "", sep="\n")
        print(of_flags() if script else of_flags(main.__module__))
        return
    app.run(checked, flags_parser=_parse)


def variant() -> str:
    """The variant of the config on the command line, "" for none."""
    return config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[2]


def workdir(given: str | None, suffix: str = "") -> str:
    """The work directory `given`; for None runs/NAME_VARIANT_SUFFIX, after the config."""
    if given is not None:
        return given
    file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    parts = [pathlib.Path(file).stem, variant, suffix]
    return str(pathlib.Path("runs", "_".join(filter(None, parts))))


def warn_of_smoke() -> None:
    """Prints that the numbers mean nothing if the config is the variant "smoke"."""
    if variant() == "smoke":
        print("A smoke run shows that everything works; its numbers mean nothing.")


def overrides() -> list[str]:
    """The dotted keys that the command line overrides, such as "model.width"."""
    return list(config_flags.get_override_values(flags.FLAGS["config"]))


def configs() -> dict[str, pathlib.Path]:
    """Name -> file of the configs of the package."""
    folders = importlib.import_module("lla.configs").__path__
    files = [file for folder in folders for file in sorted(pathlib.Path(folder).glob("*.py"))]
    return {file.stem: file for file in files if file.stem != "__init__"}


def for_each_result(
    work: Callable[[pathlib.Path], Iterable[Any]],
    results: pathlib.Path,
    argv: Sequence[str],
    description: str,
) -> int:
    """The main function of a script that reads or draws work directories.

    Args:
      work: what to do with a work directory; what it returns is printed, an item a line.
      results: the folder of the committed work directories, for a command line without arguments.
      argv: the command line, without the name of the program: work directories or `--help`.
      description: of the script, for `--help`.

    Returns:
      The exit status: 1, after a line on standard error, if a directory cannot be read; else 0.
    """
    parser = argparse.ArgumentParser(description=description)
    what = "a work directory; default: all committed results"
    parser.add_argument("workdir", nargs="*", type=pathlib.Path, help=what)
    paths = [path.expanduser() for path in parser.parse_args(argv).workdir]
    paths = paths or sorted(file.parent for file in results.glob("*/config.json"))
    try:
        if not paths:
            raise WorkdirError(f"{results} has no results; name a work directory.")
        for path in paths:
            read_config(path)  # raises for anything else than a work directory
            print(*work(path), sep="\n")
    except WorkdirError as error:
        sys.stderr.write(f"FATAL {error}\n")
        return 1
    return 0


def _parse(argv):
    warnings.formatwarning = _one_line
    argv = [_with_path(argument) for argument in _joined(argv)]
    try:
        positional = flags.FLAGS(argv)
        _check_file()
    except flags.Error as error:
        _exit(error)
    except _ERRORS as error:
        # The config library names the nearest key only if it is similar, and adds a traceback.
        _exit(_unknown_key(argv) or error)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the checkpoint library logs every rename
    return positional


def _joined(argv):
    """The same with `--config NAME`, two arguments, as `--config=NAME`."""
    argv, found = iter(argv), []
    for argument in argv:
        if argument in ("--config", "-config") and (name := next(argv, None)) is not None:
            argument = f"{argument}={name}"
        found.append(argument)
    return found


def _with_path(argument):
    """`--config=mqar:smoke` names a config of the package, unless there is a file "mqar"."""
    match = _NAME.fullmatch(argument)
    if match is None or pathlib.Path(match[2]).is_file() or match[2] not in (known := configs()):
        return argument
    return f"{match[1]}{known[match[2]]}{match[3] or ''}"


def _is_python(path):
    return path.suffix == ".py"


def _check_file():
    """Raises ValueError if the config is not a ConfigDict; the config library does not check."""
    if "config" not in flags.FLAGS or flags.FLAGS["config"].value is None:
        return
    flag = flags.FLAGS["config"]
    file = config_flags.get_config_filename(flag).partition(":")[0]
    if not pathlib.Path(file).is_file():
        near = difflib.get_close_matches(pathlib.Path(file).stem, configs(), n=1)
        if not (hint := paths.hint(pathlib.Path(file), _is_python)) and near:
            hint = f" Did you mean {near[0]}?"
        raise ValueError(f"--config must be a config file, and there is no file {file!r}.{hint}")
    if not isinstance(flag.value, ConfigDict):
        raise ValueError(f"get_config() of {file!r} must return a ConfigDict, got {flag.value!r}.")


def _unknown_key(argv):
    """What is wrong with the overrides, found by reading the config without them."""
    paths = [match.group(1) for argument in argv if (match := _OVERRIDE.match(argument))]
    plain = [argument for argument in argv if not _OVERRIDE.match(argument)]
    given, sys.argv = sys.argv, plain  # where the config library looks for overrides
    try:
        flags.FLAGS.unparse_flags()
        flags.FLAGS(plain)
        _check_file()
    except (flags.Error, *_ERRORS) as error:
        return error
    finally:
        sys.argv = given
    for path in paths:
        section, at = flags.FLAGS["config"].value, "config"
        for key in path.split("."):
            if not hasattr(section, "keys"):
                return f"{at} is not a section: it has no {key}."
            try:
                check_keys(at, [key], section.keys())
            except ValueError as error:
                return error
            section, at = section[key], f"{at}.{key}"
    return None


def _one_line(message, category, *_):
    return f"{category.__name__}: {message}\n"


def _exit(error):
    # A ValueError of a config file comes with a traceback before its own text.
    text = str(error).strip().splitlines()
    if any(line.startswith("Traceback") for line in text):
        text = text[-1:]
    sys.stderr.write(f"FATAL Flags parsing error: {' '.join(text)}\n")
    sys.exit(1)
