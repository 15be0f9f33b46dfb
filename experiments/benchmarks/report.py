"""Renews the tables in pages/ and the figures in figures/ from the result files alone.

    python experiments/benchmarks/report.py              # pages and figures
    python experiments/benchmarks/report.py --check      # exit status 1 if a page is out of date
    python experiments/benchmarks/report.py --add FILE   # also takes in a new result file

`pages/BENCHMARK.md` has one generated block for each result file of that benchmark. The tables come
from the function `markdown` of the benchmark's module, the figure from its function `draw`, if it
has one.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

from lla.experiments.benchmarks.results import RESULTS, load
from lla.runs import blocks, figures

FOLDER = pathlib.Path(__file__).resolve().parent
PAGES, FIGURES = FOLDER / "pages", FOLDER / "figures"
# Benchmarks with a module of their own for tables and figure.
_TABLES = {"hopper": "hopper_tables"}


def module_of(document: Mapping) -> ModuleType:
    """The module with the tables of the benchmark that wrote a result file."""
    name = document["header"]["benchmark"]
    return importlib.import_module(f"lla.experiments.benchmarks.{_TABLES.get(name, name)}")


def documents(results: pathlib.Path) -> dict[str, dict[str, dict]]:
    """Benchmark -> name of a result file -> what is in it."""
    found: dict[str, dict[str, dict]] = {}
    for path in sorted(results.glob("*.json")):
        document = load(path)
        found.setdefault(document["header"]["benchmark"], {})[path.stem] = document
    return found


def block(name: str, document: Mapping) -> str:
    """What stands between the markers of a result file: tables and a link to the figure."""
    module, image = module_of(document), ""
    if hasattr(module, "CAPTION"):
        image = f"\n\n![{module.CAPTION}](../figures/{name}.png)"
    return f"{module.markdown(document)}{image}\n"


def render(text: str, found: Mapping[str, Mapping]) -> str:
    """The text of a page with every block renewed; `found` has its result files by name.

    Raises:
      ValueError: the page lacks the block of a result file, or has another one.
    """
    return blocks.renew(text, lambda name: block(name, found[name]), found)


def add(path: pathlib.Path, results: pathlib.Path, pages: pathlib.Path) -> pathlib.Path:
    """Copies a result file to `results` and appends its block to a page; returns the page."""
    header = load(path)["header"]
    destination, page = results / path.name, pages / f"{header['benchmark']}.md"
    if path.resolve() != destination.resolve():
        shutil.copyfile(path, destination)
    text = page.read_text(encoding="utf-8") if page.exists() else f"# {header['benchmark']}\n"
    if path.stem not in blocks.names(text):
        markers = f"<!-- generated: {path.stem} -->\n<!-- end generated -->"
        text = f"{text.rstrip()}\n\n## {header['device']['kind']}\n\n{markers}\n"
        page.write_text(text, encoding="utf-8")
    return page


def draw(name: str, document: Mapping, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the figure of a result file as PNG and SVG; returns their paths, [] without one."""
    module = module_of(document)
    if not hasattr(module, "CAPTION"):
        return []
    figure = module.draw(document["records"])
    return figures.save(figure, folder, name, name=name, png_metadata={"Software": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    parser.add_argument("--add", type=pathlib.Path, help="a result file to take in")
    options = parser.parse_args(argv)
    if options.add is not None:
        add(options.add, RESULTS, PAGES)
    status = 0
    for benchmark, found in documents(RESULTS).items():
        page = PAGES / f"{benchmark}.md"
        text = page.read_text(encoding="utf-8")
        renewed = render(text, found)
        if options.check:
            if renewed != text:
                print(f"{page.name} is out of date")
                status = 1
            continue
        page.write_text(renewed, encoding="utf-8")
        for name, document in found.items():
            for path in draw(name, document, FIGURES):
                print(path)
    return status


if __name__ == "__main__":
    sys.exit(main())
