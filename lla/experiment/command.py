"""A main whose mistakes on the command line are one line of text, not a traceback."""

import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from lla.experiment.boundary import check_keys

_OVERRIDE = re.compile(r"--?config\.([\w.]+)")


def run(main: Callable[[Sequence[str]], None]) -> None:
    """`absl.app.run` for a program with a config flag "config".

    An override of a key that the config does not have ends with exit status 1 and the nearest key
    that it has; so does a config file that raises ValueError. `main` itself may raise
    `absl.app.UsageError` for what it finds wrong later.
    """
    app.run(main, flags_parser=_parse)


def _parse(argv):
    try:
        positional = flags.FLAGS(argv)
    except flags.Error as error:
        _exit(error)
    except (AttributeError, KeyError, ValueError) as error:
        # The config library names a key only where it is similar, and with its own traceback.
        _exit(_unknown_key(argv) or error)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the checkpoint library tells every rename
    return positional


def _unknown_key(argv):
    """What is wrong with the overrides, found by reading the config without them."""
    paths = [match.group(1) for argument in argv if (match := _OVERRIDE.match(argument))]
    plain = [argument for argument in argv if not _OVERRIDE.match(argument)]
    given, sys.argv = sys.argv, plain  # where the config library looks for overrides
    try:
        flags.FLAGS.unparse_flags()
        flags.FLAGS(plain)
    except (flags.Error, AttributeError, KeyError, ValueError) as error:
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


def _exit(error):
    sys.stderr.write(f"FATAL Flags parsing error: {error}\n")
    sys.exit(1)
