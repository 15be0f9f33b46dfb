"""What the tests of mixers measure: the largest array of a computation."""

import jax


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
