"""The version of the distribution `lla-jax`; its one source, which setup.py reads."""

__version__ = "0.1.0.dev0"
