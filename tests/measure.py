"""What tests of every part measure."""

import jax
import numpy as np


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
