"""What is installed, under which names, and that every place tells the same version."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from lla.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
# folder here: folder in the wheel
INSTALLED = {
    "lla": "lla",
    "kernels": "lla/kernels",
    "configs": "lla/configs",
    "experiments": "lla/experiments",
}


def sources(folder: str) -> list[Path]:
    texts = (ROOT / folder / "tasks" / "sample_text").glob("*.txt")
    return sorted([*(ROOT / folder).rglob("*.py"), *(ROOT / folder).glob("py.typed"), *texts])


def copied(copy: Path, *others: str) -> Path:
    """A copy of the sources, and of other files: a build leaves files beside them."""
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", *others):
        shutil.copy(ROOT / name, copy)
    for folder in ("lla", "kernels", "configs", "experiments", "tests"):
        for source in sources(folder):
            target = copy / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return copy


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the sources."""
    copy = copied(tmp_path_factory.mktemp("source") / "copy")
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    # -c puts the current folder on the path, as an isolated build does not; PYTHONSAFEPATH removes
    # it, so that setup.py is read without the sources being importable.
    result = subprocess.run(
        [sys.executable, "-c", build],
        cwd=copy,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return path


def test_wheel_holds_the_library_and_nothing_else(wheel):
    check_contents(wheel)


def check_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        f"{target}/{source.relative_to(ROOT / folder).as_posix()}"
        for folder, target in INSTALLED.items()
        for source in sources(folder)
    }
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    # Equality both ways: a folder without __init__.py would be missing, and tests or a top-level
    # kernels, configs or experiments would be in excess.
    assert names - metadata == expected
    assert {name.split("/")[0] for name in names - metadata} == {"lla"}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    assert wheel.name.startswith(f"lla_jax-{lla.__version__}-")


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    """What an installation of the wheel puts into site-packages."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_unpacked(unpacked: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Python with the wheel in front of all other packages, this checkout included."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_command_is_an_entry_point(unpacked, tmp_path):
    (metadata,) = unpacked.glob("*.dist-info")
    found = metadata.joinpath("entry_points.txt").read_text()
    named = dict(re.findall(r"^lla-(\w+) = (\S+)$", found, re.MULTILINE))
    assert named == {name: function for name, (function, _) in COMMANDS.items()}
    for function in named.values():
        # Not imported: two of them define the same flags.
        module, _, name = function.partition(":")
        source = (unpacked / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(\) -> None:$", source, re.MULTILINE), function


def test_the_wheel_trains_and_draws_from_another_folder(unpacked, tmp_path):
    flags = ("--config=mqar:smoke", "--config.model.mixer.name=linear")
    done = run_unpacked(unpacked, tmp_path, "-m", "lla", "train", *flags)
    assert done.returncode == 0, done.stderr
    last, folder, note = done.stdout.splitlines()
    record = json.loads((tmp_path / folder / "environment.json").read_text())
    assert record["command"][0] == "lla-train" and record["versions"]["lla-jax"] == lla.__version__
    assert last.startswith("finished at step 8: validation/accuracy")
    assert note == "A smoke run shows that everything works; its numbers mean nothing."
    done = run_unpacked(unpacked, tmp_path, "-m", "lla", "figure", "curves", folder)
    assert done.returncode == 0 and "Linear attention: " in done.stdout, done.stderr
    assert folder == "runs/mqar_smoke" and (tmp_path / folder / "curves.png").exists()


@pytest.mark.slow
def test_sdist_and_wheel_work_in_a_fresh_environment(tmp_path):
    """From the sources to a package that runs; needs a package index, and takes minutes."""
    extra = ("README.md", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in")
    copy = copied(tmp_path / "copy", *extra)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
    }

    def run(*command, cwd=tmp_path):
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def make(name, *requirements):
        run(sys.executable, "-m", "venv", tmp_path / name)
        run(tmp_path / name / "bin" / "python", "-m", "pip", "install", "-q", *requirements)
        return tmp_path / name / "bin"

    tools = make("tools", "build", "twine")
    run(tools / "python", "-m", "build", cwd=copy)  # the wheel from the sdist
    (sdist,), (wheel,) = (copy / "dist").glob("*.tar.gz"), (copy / "dist").glob("*.whl")
    run(tools / "twine", "check", "--strict", sdist, wheel)
    check_contents(wheel)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "setup.py"} <= names
    assert not [name for name in names if name.startswith("tests/")]

    fresh = make("fresh", wheel)
    assert "0 failed" in run(fresh / "lla-selftest", "--quick")
    assert "lla-train, lla-sweep" in run(fresh / "lla-train", "--list")
    flags = ("--config=mqar:smoke", "--workdir=run")
    assert "finished at step 8" in run(fresh / "lla-train", *flags)
    assert "answers are right" in run(fresh / "lla-generate", "--workdir=run")
    # The figure needs the extra "plot"; the text does not.
    assert "LLA: " in run(fresh / "lla-figure", "curves", "run", "--text")
    assert "None" in run(
        fresh / "python", "-c", "import importlib.util as u; print(u.find_spec('kernels'))"
    )
    study = ("--config=test_time_regression:smoke", "--workdir=study")
    with pytest.raises(AssertionError, match=r'FATAL figures need Matplotlib.*"lla-jax\[plot\]"'):
        run(fresh / "lla-study", *study)
    run(fresh / "python", "-m", "pip", "install", "-q", f"{wheel}[plot]")
    assert "figure.png" in run(fresh / "lla-study", *study)
    assert "curves.png" in run(fresh / "lla-figure", "curves", "run")


@pytest.mark.compat
def test_import_from_another_folder(tmp_path):
    """The installed distribution needs neither the repository nor a PYTHONPATH to be found."""
    probe = (
        "import importlib.util, lla.kernels; "
        "print(lla.__version__, importlib.util.find_spec('kernels'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [lla.__version__, "None"]


@pytest.mark.compat
def test_version_is_the_same_everywhere():
    assert importlib.metadata.version("lla-jax") == lla.__version__
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation and citation.group(1) == lla.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    if ".dev" in lla.__version__:
        assert f"## [Unreleased]\n\nIn development as {lla.__version__}.\n" in changelog
    else:
        assert f"\n## [{lla.__version__}] - " in changelog


def test_the_release_has_notes():
    release = lla.__version__.partition(".dev")[0]
    notes = (ROOT / "release_notes" / f"{release}.md").read_text(encoding="utf-8")
    assert notes.startswith(f"# lla-jax {release}\n")
    for name in re.findall(r"`(lla\.[\w.]+)`", notes):
        found = lla
        for part in name.split(".")[1:]:
            found = getattr(found, part)
    assert set(re.findall(r"`lla-(\w+)`", notes)) <= set(COMMANDS)


def test_files_are_named_by_what_is_in_them():
    folders = ("lla", "kernels", "configs", "experiments", "tests")
    assert not [path for folder in folders for path in sources(folder) if path.name == "utils.py"]


def test_files_name_no_place_of_one_machine():
    """Nothing that runs depends on where the repository, a home or an environment lies."""
    absolute = re.compile(r"""["'\s=(](/(?:home|root|work|Users|opt|mnt|tmp)/[\w./-]*)""")
    texts = [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), ROOT / ".ci/run"]
    for folder in ("lla", "kernels", "configs", "experiments"):
        texts += sources(folder)
    found = {
        str(path.relative_to(ROOT)): absolute.findall(path.read_text(encoding="utf-8"))
        for path in texts
    }
    assert {name: places for name, places in found.items() if places} == {}


@pytest.mark.compat
def test_settings_of_the_tests_hold(float64):
    assert jax.device_count("cpu") == 8
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.bfloat16)
    with pytest.raises(ValueError, match="rank"):
        jnp.ones((2, 2)) + jnp.ones(2)
    third = 1 / 3
    with float64():
        inside = np.asarray(jnp.asarray(third) * 3.0)
    assert inside.dtype == np.float64
    assert jnp.asarray(third).dtype == jnp.float32
