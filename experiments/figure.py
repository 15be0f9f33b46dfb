"""Draws learning curves, and the figures of the experiments.

    lla-figure curves runs/mqar                    # of one run or sweep, in the terminal and as PNG
    lla-figure curves runs/lla runs/softmax        # of several, side by side
    lla-figure curves runs/mqar --metric=train/loss --output=loss.png
    lla-figure mqar                                # a figure of the experiments; see --help

From a checkout `python experiments/figure.py` is the same.
"""

import argparse
import importlib
import pathlib
import pkgutil
import shutil
import sys
from collections.abc import Sequence

import lla.experiments
from lla.registry import unknown


def names() -> list[str]:
    """The experiments that have a figure: those with a plot.py."""
    folders = [pathlib.Path(folder) for folder in lla.experiments.__path__]
    found = [module.name for module in pkgutil.iter_modules(lla.experiments.__path__)]
    return [name for name in found if any((f / name / "plot.py").exists() for f in folders)]


def draw_curves(argv: Sequence[str]) -> int:
    """`lla-figure curves WORKDIR...`; returns the exit status."""
    from lla.runs import curves

    parser = argparse.ArgumentParser(
        prog="lla-figure curves",
        description="Draws learning curves of runs and sweeps, also of those that still train.",
    )
    what = "a work directory of lla-train or lla-sweep, or the folder of one point of a sweep"
    parser.add_argument("workdir", nargs="+", type=pathlib.Path, help=what)
    metric = "such as validation/loss, or train/loss for that of the batches; default: the primary"
    parser.add_argument("--metric", help=metric)
    output = "the PNG; default: curves.png in the only WORKDIR, or in the current folder"
    parser.add_argument("--output", type=pathlib.Path, help=output)
    parser.add_argument("--text", action="store_true", help="in the terminal only")
    options = parser.parse_args(argv)
    paths = [path.expanduser() for path in options.workdir]
    try:
        metric, found = curves.read(paths, options.metric)
    except (ImportError, ValueError) as error:
        return _failed(error)
    size = shutil.get_terminal_size((80, 24))
    print(*curves.text(metric, found, width=min(size.columns, 100)), sep="\n")
    if options.text:
        return 0
    output = options.output or (paths[0] if len(paths) == 1 else pathlib.Path()) / "curves.png"
    try:
        figure = curves.draw(metric, found)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=220)
    except ImportError as error:
        return _failed(f"{error}, or give --text.")
    except (OSError, ValueError) as error:  # such as an ending that is no kind of picture
        return _failed(f"--output: {error}")
    print(output)
    return 0


def main(argv: Sequence[str]) -> int:
    """`lla-figure NAME ...`; returns the exit status."""
    name, *arguments = argv or ("--help",)
    if name in ("--help", "-help", "-h"):
        print(__doc__)
        print(f"Figures: {', '.join(names())}. NAME --help explains one.")
        return 0
    if name == "curves":
        return draw_curves(arguments)
    if name not in names():
        return _failed(unknown("figure", name, ["curves", *names()]))
    plot = importlib.import_module(f"lla.experiments.{name}.plot")
    if not arguments and not (pathlib.Path(plot.__file__).parent / "results").is_dir():
        return _failed(
            f"the results that {name} is drawn from are in the repository, not in the installed "
            "package: name a folder with results of your own, or draw from a checkout."
        )
    return plot.main(arguments)


def run() -> None:
    """The command `lla-figure`."""
    sys.exit(main(sys.argv[1:]))


def _failed(error) -> int:
    sys.stderr.write(f"FATAL {error}\n")
    return 1


if __name__ == "__main__":
    run()
