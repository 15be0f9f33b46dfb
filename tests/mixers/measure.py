"""What the tests of mixers measure: relative errors, and the largest array of a computation."""

import jax
import numpy as np


def relative_error(actual, expected):
    """Frobenius norm of the difference, relative to `expected`; `actual` has to be finite."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


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
