"""README.md, docs/ and other Markdown files: code runs, commands parse, links lead somewhere."""

import ast
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import jax
import pytest
import setuptools

from lla import training
from lla.__main__ import COMMANDS
from lla.mixers.registry import _MIXERS
from lla.tasks.registry import _TASKS

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs").rglob("*.ipynb"))
MARKDOWN = [
    *ROOT.glob("*.md"),
    *DOCS,
    *ROOT.glob("kernels/*.md"),
    *ROOT.glob("lla/**/*.md"),
    *ROOT.glob("experiments/**/*.md"),
]
# Python is run and sh is checked. "text" is for what needs a machine or a name of the reader's.
DEFINE_FLAGS = ("experiments/run_study.py", "experiments/trained/tables.py")  # for other scripts
LANGUAGES = {"sh", "python", "bibtex", "toml", "text"}


def name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: pathlib.Path, language: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(path: pathlib.Path) -> list[list[str]]:
    """The words of each command in the sh blocks of a page."""
    lines = " && ".join(line for block in blocks(path, "sh") for line in block.splitlines())
    return [shlex.split(part) for part in lines.split(" && ") if part]


@pytest.fixture
def own_names(monkeypatch):
    """Names that a page registers are gone afterwards."""
    for registry in (_MIXERS, _TASKS):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))


def run(codes: list[str], path: pathlib.Path) -> None:
    """In one namespace and in order, as a reader would, under JAX's own promotion rules."""
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in codes:
            exec(compile(code, name(path), "exec"), namespace)


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200
    installs = [words for words in commands(README) if words[1:2] == ["install"]]
    assert len(installs) == 2


@pytest.mark.parametrize("path", [README, *DOCS], ids=name)
def test_every_block_is_of_a_kind_that_is_tested(path):
    text = path.read_text(encoding="utf-8")
    languages = re.findall(r"^```(\w*)\n.*?^```$", text, re.DOTALL | re.MULTILINE)
    assert set(languages) <= LANGUAGES


@pytest.mark.compat
def test_python_of_the_readme_runs():
    assert blocks(README, "python")
    run(blocks(README, "python"), README)


# Sharding, custom derivatives and Flax's layers differ between versions of JAX.
COMPAT = {"swap_attention.md", "multiple_devices.md"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.compat] if path.name in COMPAT else [])
        for path in DOCS
        if "```" in path.read_text(encoding="utf-8")
    ],
    ids=name,
)
def test_a_page_runs(path, own_names):
    run(blocks(path, "python"), path)
    for words in commands(path):
        check(words)


def test_commands_of_the_readme():
    found = commands(README)
    assert len(found) > 5
    for words in found:
        check(words)


def check(words: list[str]) -> None:
    """A command names files, extras, flags and fields of configs that exist."""
    program, *words = words
    program = program.removeprefix(".venv/bin/")
    if program.startswith("lla-"):
        module = COMMANDS[program.removeprefix("lla-")][0].partition(":")[0]
        words = [module.removeprefix("lla.").replace(".", "/") + ".py", *words]
        words[0] = words[0].replace("selftest.py", "lla/selftest.py")
        program = "python"
    assert program in ("python", "python3", "pip"), program
    if program == "pip":
        assert words[:2] == ["install", "-e"]
        extras = set(re.findall(r"\w+", re.fullmatch(r"\.(\[.*\])?", words[2])[1] or ""))
        setup = (ROOT / "setup.py").read_text(encoding="utf-8")
        assert all(f'"{extra}": ' in setup for extra in extras), extras
        return
    if words[0] == "-m":
        if words[1] not in ("venv", "pytest"):
            source = importlib.util.find_spec(words[1]).origin
            check_flags(words[2:], pathlib.Path(source).read_text(encoding="utf-8"))
        return
    check_flags(words[1:], "".join(map(source_of, (words[0], *DEFINE_FLAGS))))
    config = {key: value for key, _, value in (word.partition("=") for word in words[1:])}
    if "--config" in config:
        check_config(config)


def source_of(script: str) -> str:
    return (ROOT / script).read_text(encoding="utf-8")


def check_flags(words: list[str], source: str) -> None:
    for word in words:
        flag = re.match(r"--(\w+)", word)
        assert flag is None or re.search(rf'["\'](--)?{flag[1]}["\']', source), word


def check_config(config: dict[str, str]) -> None:
    """A config file with its variant, and overrides as `ml_collections` would apply them."""
    path, _, variant = config["--config"].partition(":")
    module = runpy.run_path(str(ROOT / (path if path.endswith(".py") else f"configs/{path}.py")))
    made = module["get_config"](variant) if variant else module["get_config"]()
    for key, value in config.items():
        if key.startswith("--config."):
            with contextlib.suppress(ValueError, SyntaxError):  # a string without quotes
                value = ast.literal_eval(value)
            made.update_from_flattened_dict({key.removeprefix("--config."): value})
    if "training" in made:
        training.resolve(made.to_dict())


def test_a_wrong_command_is_found():
    good = "python experiments/train.py --config=configs/mqar.py:smoke --workdir=runs/a"
    check(shlex.split(good))
    check(shlex.split("lla-train --config=mqar:smoke --config.model.width=3"))
    for wrong in (
        "lla-trian --config=mqar:smoke",
        good.replace("train", "trian"),
        good.replace("workdir", "workdirs"),
        good.replace("smoke", "smok"),
        good + " --config.model.widht=3",
        good + " --config.model.mixer.name=glaa",
        'pip install -e ".[dosc]"',
    ):
        with pytest.raises((AssertionError, OSError, KeyError, ValueError)):
            check(shlex.split(wrong))


@pytest.mark.slow
@pytest.mark.parametrize("path", [README, *DOCS], ids=name)
def test_smoke_commands_run(path, tmp_path):
    """In order and in an empty folder; those that follow a smoke run read what it wrote."""
    written = set()
    for program, *words in commands(path):
        folders = {
            word.removeprefix("--workdir=")
            for word in words
            if word.startswith(("runs/", "--workdir=runs/"))
        }
        if any(":smoke" in word for word in words):
            written |= folders
        if not folders or not folders <= written or "decaying_mean" in " ".join(words):
            continue  # long, or it needs an installed package: tests/test_extending.py
        command = program.removeprefix(".venv/bin/lla-")
        assert command in COMMANDS, program
        result = subprocess.run(
            [sys.executable, "-m", "lla", command, *words],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
    assert bool(written) == (tmp_path / "runs").exists() or path.name == "write_a_mixer.md"


def anchors(path: pathlib.Path) -> set[str]:
    """Anchors of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", MARKDOWN, ids=name)
def test_links(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), link
        if anchor:
            assert anchor in anchors(found), link


def test_references_to_documents_in_code():
    sources = [
        path
        for folder in ("kernels", "lla", "tests", "experiments", "configs")
        for path in (ROOT / folder).rglob("*.py")
    ]
    for path in sources:
        text = path.read_text(encoding="utf-8")
        for found in re.findall(r"(?<![\w/.])((?:kernels|docs|lla)/[\w/-]+\.md)", text):
            assert (ROOT / found).exists(), (name(path), found)


def test_links_are_absolute_on_a_package_index(tmp_path, monkeypatch):
    """Once the repository has an address, in lla/version.py."""
    for file in ("setup.py", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "lla").mkdir()
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(tmp_path)

    def description(address):
        version = f'__version__ = "1"\nREPOSITORY = "{address}"\n'
        (tmp_path / "lla" / "version.py").write_text(version)
        runpy.run_path(str(tmp_path / "setup.py"))
        return given["long_description"]

    readme = README.read_text(encoding="utf-8")
    relative = re.findall(r"\]\((?!https?:|#)([^)]+)\)", readme)
    assert len(relative) > 20 and any(target.endswith(".png") for target in relative)
    assert description("") == readme
    text = description("https://host/owner/name")
    assert not re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
    for target in relative:
        kind = "raw" if target.endswith(".png") else "blob"
        assert f"](https://host/owner/name/{kind}/main/{target})" in text


def test_the_tables_are_those_of_the_results(capsys):
    from lla.experiments import front_page

    assert front_page.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_runs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] for cell in cells)
    run(["".join(cell["source"]) for cell in cells], path)


def test_a_notebook_opens_in_colab(monkeypatch):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    page = hooks["notebook_page"]
    (path,) = NOTEBOOKS
    assert "colab.research.google.com/" in page(path)
    monkeypatch.setitem(page.__globals__, "repository", lambda: "https://github.com/OWNER/NAME")
    address = f"https://colab.research.google.com/github/OWNER/NAME/blob/main/{name(path)}"
    assert f"]({address})" in page(path)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("material", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    site = tmp_path / "site"
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    page = (site / "reference" / "operator" / "index.html").read_text(encoding="utf-8")
    assert "a weighted ridge regression around every" in page
    assert (site / "tutorials" / "quickstart.ipynb").exists()
    assert (site / "experiments" / "mqar" / "results" / "figure.png").exists()
