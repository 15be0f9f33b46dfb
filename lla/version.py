"""The version of the distribution `lla-jax`, and where it comes from; setup.py reads both."""

__version__ = "0.1.0.dev0"

# The public address of the repository, such as https://github.com/OWNER/NAME, and empty until there
# is one. It makes links absolute on a package index, and those of the documentation to other files.
REPOSITORY = ""


def document(path: str) -> str:
    """Where a reader finds a file of the repository: its address, or its path in a checkout."""
    return f"{REPOSITORY}/blob/main/{path}" if REPOSITORY else path
