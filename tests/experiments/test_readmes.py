"""The Markdown files under experiments/: their commands name files that exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "experiments"
PAGES = sorted(FOLDER.rglob("*.md"))


def blocks(text):
    """Commands: indented blocks and code in backticks, without what is generated."""
    text = re.sub(r"<!-- generated.*?end generated -->", "", text, flags=re.DOTALL)
    if "This study is finished" in text:  # its code is not kept
        return []
    return re.findall(r"^    .*$|`[^`\n]*`", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(FOLDER)))
def test_commands_name_files(page):
    text = page.read_text(encoding="utf-8")
    for command in blocks(text):
        for path in re.findall(r"(?<![\w/.])(?:experiments|configs)/[\w/]+\.py", command):
            assert (ROOT / path).is_file(), path
        for module in re.findall(r"-m lla\.experiments\.([\w.]+)", command):
            assert (FOLDER / (module.replace(".", "/") + ".py")).is_file(), module


def test_every_figure_has_a_command_that_draws_it_again():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| figure | claim |") :].split("\n\n")[0].splitlines()[2:]
    redrawn = {row.split("|")[6].strip(" `") for row in table} - {""}
    assert redrawn == {
        *(str(path.relative_to(FOLDER)) for path in FOLDER.glob("*/plot.py")),
        "benchmarks/report.py",
        "front_page.py",
    }
    for row in table:
        script = row.split("|")[7].strip(" `").split(" ")[0]
        assert script == "one" or (FOLDER / script).is_file(), script
