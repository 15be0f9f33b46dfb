"""All commands of the package: ``python -m lla COMMAND ...``.

``python -m lla train`` is the same as ``lla-train``, and so on.
"""

import importlib
import sys
from collections.abc import Sequence

from lla.registry import unknown

# Command -> the function, whose command line is sys.argv, and what the command does.
COMMANDS = {
    "train": ("lla.experiments.train:run", "trains a model on a task"),
    "sweep": ("lla.experiments.sweep:run", "trains a grid of settings, seeds and learning rates"),
    "generate": ("lla.experiments.generate:run", "answers or writes with a trained model"),
    "study": ("lla.experiments.run_study:run", "runs an experiment that trains no model"),
    "figure": ("lla.experiments.figure:run", "draws learning curves and the figures"),
    "selftest": ("lla.selftest:run", "checks every implementation on this machine"),
}


def main(argv: Sequence[str]) -> None:
    """Runs a command.

    Args:
      argv: the command line, without the name of the program.
    """
    name, *arguments = argv or ("--help",)
    if name in ("--help", "-help", "-h"):
        print("usage: python -m lla COMMAND ...\n")
        for command, (_, meaning) in COMMANDS.items():
            print(f"  {command:<10}{meaning}")
        print("\nCOMMAND --help explains a command; train --list names what there is to train.")
        return
    if name not in COMMANDS:
        sys.exit(f"FATAL {unknown('command', name, COMMANDS)}")
    module, function = COMMANDS[name][0].split(":")
    sys.argv = [f"lla-{name}", *arguments]
    getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    main(sys.argv[1:])
