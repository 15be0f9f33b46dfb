"""Packaging of lla-jax. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

# Executed rather than imported: importing lla would need JAX at build time.
version = {}
exec((ROOT / "lla" / "version.py").read_text(encoding="utf-8"), version)


def description() -> str:
    """README.md, with absolute links once the repository has an address."""
    text = README.read_text(encoding="utf-8") if README.exists() else ""
    if not version["REPOSITORY"]:
        return text

    def absolute(match):
        kind = "raw" if match[2].endswith(".png") else "blob"
        return f"{match[1]}({version['REPOSITORY']}/{kind}/main/{match[2]})"

    return re.sub(r"(\])\((?!https?:|#)([^)\s]+)\)", absolute, text)


# Folders beside lla/ that are installed inside it, so that nothing else gets a top-level name.
INSIDE = {f"lla.{folder}": folder for folder in ("kernels", "configs", "experiments")}
packages = find_packages(include=["lla", "lla.*"])
for package, folder in INSIDE.items():
    packages += [package, *(f"{package}.{name}" for name in find_packages(folder))]

# The functions that `lla-train` and the others call; lla/__main__.py has the same commands.
commands = {
    "train": "lla.experiments.train",
    "sweep": "lla.experiments.sweep",
    "generate": "lla.experiments.generate",
    "study": "lla.experiments.run_study",
    "figure": "lla.experiments.figure",
    "selftest": "lla.selftest",
}

# Lower bounds are the oldest versions that the tests run with. Python 3.11 gets these.
JAX = ">=0.10.2"
plot = ["matplotlib>=3.11"]  # figures as files: lla-figure
data = ["statsmodels>=0.15"]  # ships the real series that the experiments use
text = ["tokenizers>=0.22"]  # for language models on text files
tensorboard = ["tensorboard>=2.20"]  # lla-train writes for it wherever it is installed
test = [
    *plot,
    *data,
    *text,
    "chex>=0.1.92",
    "pyright[nodejs]==1.1.414",  # exact: strict checks grow; with a Node.js of its own
    "pytest>=9.2",
    "pytest-xdist>=3.8",
    "ruff==0.17.6",  # exact: the formatter's output changes between minor versions
    "setuptools>=77",  # a test builds the wheel
]
docs = ["mkdocs-material>=9.8,<10", "mkdocstrings[python]>=1.0.8"]

setup(
    name="lla-jax",
    version=version["__version__"],
    description="Local linear attention for JAX: exact, differentiable, in linear memory.",
    long_description=description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=packages,
    package_dir={"lla": "lla", **INSIDE},
    package_data={"lla": ["py.typed"], "lla.tasks": ["sample_text/*.txt"]},
    python_requires=">=3.11",
    install_requires=[
        f"jax{JAX}",
        "flax>=0.12.8",
        "numpy>=2.4",
        "absl-py>=2.5",
        "ml_collections>=1.1",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
    ],
    extras_require={
        "cuda12": [f"jax[cuda12]{JAX}"],
        "cuda13": [f"jax[cuda13]{JAX}"],
        "tpu": [f"jax[tpu]{JAX}"],
        "docs": docs,
        "plot": plot,
        "data": data,
        "text": text,
        "tensorboard": tensorboard,
        "experiments": [*plot, *data, *text],
        "test": test,
        "dev": [*test, "pre-commit>=4.0"],
    },
    entry_points={
        "console_scripts": [f"lla-{name} = {module}:run" for name, module in commands.items()]
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords="attention, jax, local linear regression, test-time regression",
)
