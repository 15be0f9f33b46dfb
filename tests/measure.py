"""What tests of every part measure."""

import itertools

import jax
import numpy as np
import pytest


def relative_error(actual, expected) -> float:
    """Frobenius norm of the difference over that of `expected`, or over 1 where that is zero."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert np.isfinite(actual).all()
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(actual - expected) / (norm if norm > 0 else 1))


def largest_array(function, *args):
    """Number of elements of the largest array that any equation of `function` computes."""
    return _largest(jax.make_jaxpr(function)(*args).jaxpr)


def _largest(jaxpr):
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                sizes.append(_largest(getattr(inner, "jaxpr", inner)))
    return max(sizes)


def _is_jaxpr(thing):
    return hasattr(thing, "eqns")


def latin(names, *values, every=None, marks=()):
    """`pytest.mark.parametrize` of all combinations, of which one in `every` is quick.

    Every value of the first argument meets every value of each other one in the quick combinations
    as evenly as in a Latin square; the others are slow. None for `every` means ``len(values[0])``.
    """
    every = len(values[0]) if every is None else every
    cases = []
    for indices in itertools.product(*(range(len(v)) for v in values)):
        quick = sum(indices) % every == 0
        case = [v[i] for v, i in zip(values, indices, strict=True)]
        cases.append(pytest.param(*case, marks=marks if quick else pytest.mark.slow))
    return pytest.mark.parametrize(names, cases)
