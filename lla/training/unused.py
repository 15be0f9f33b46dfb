"""Overrides on the command line that would have no effect."""

from collections.abc import Collection, Iterable

_BY_SWEEP = {"training.seed": "sweep.seeds", "optimizer.learning_rate": "sweep.learning_rates"}


def check_used(overrides: Iterable[str], used: Collection[str], *, sweeps: bool) -> None:
    """Raises ValueError for the first override that nothing reads.

    Args:
      overrides: dotted keys such as "mixers.lla.ridge".
      used: names of the mixers that are trained.
      sweeps: whether they belong to a sweep rather than a single run.
    """
    for path in overrides:
        section, _, rest = path.partition(".")
        mixer = rest.partition(".")[0]
        if section == "mixers" and mixer and mixer not in used:
            raise ValueError(
                f"config.{path} has no effect: it is an option of mixer {mixer!r}, and the mixer "
                f"trained here is {' or '.join(map(repr, used))} (model.mixer.name)."
            )
        if section == "sweep" and not sweeps:
            raise ValueError(
                f"config.{path} has no effect on a single run: it is for experiments/sweep.py "
                "(lla-sweep)."
            )
        if sweeps and path in _BY_SWEEP:
            other = _BY_SWEEP[path]
            raise ValueError(f"config.{path} has no effect on a sweep: set config.{other}.")
