"""Gradients against differentiation of the definition; forward mode; second derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from lla.ops import differentiation
from tests.ops import oracles
from tests.ops.cases import Shape, make_inputs
from tests.ops.harness import (
    EVERY,
    FAST,
    REFERENCE,
    double_precision,
    errors,
    evaluate,
    exact,
    relative_error,
)

SHAPE = Shape(24, 5, num_keys=30, value_dim=3, heads=2, key_heads=1)
OPTIONS = {"query_offset": 4, "key_value_seq_lengths": np.array([27], np.int32)}


@functools.cache
def rows_of_their_own():
    """Ridge and scale that differ from row to row."""
    inputs, rng = make_inputs(SHAPE), np.random.default_rng(1)
    inputs["ridge"] = np.exp(rng.normal(size=SHAPE.rows))
    inputs["scale"] = inputs["scale"] * np.exp(0.5 * rng.normal(size=SHAPE.rows))
    return inputs


@pytest.mark.parametrize("name", ["query", "key", "value", "ridge", "scale"])
def test_reference_against_finite_differences_of_the_definition(name):
    """Central differences of the least-squares oracle along a random direction, in float64."""
    inputs, rng = rows_of_their_own(), np.random.default_rng(2)
    valid = oracles.visible(SHAPE, **OPTIONS)
    direction = rng.normal(size=inputs[name].shape)

    def loss(step):
        moved = {**inputs, name: inputs[name] + step * direction}
        return (oracles.weighted_least_squares(moved, valid) * inputs["cotangent"]).sum()

    # Fourth order: the truncation error is about step^4, the rounding 1e-14 / step.
    step = 1e-3
    slope = 8 * (loss(step) - loss(-step)) - (loss(2 * step) - loss(-2 * step))
    slope /= 12 * step
    gradient = exact(inputs, rounded="float64", **OPTIONS).gradients[name]
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-7)


@pytest.mark.parametrize("implementation", FAST, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_against_differentiation_of_the_reference(dtype, implementation):
    inputs = rows_of_their_own()
    want = exact(inputs, rounded=dtype, **OPTIONS)
    got = evaluate(inputs, implementation, dtype=dtype, **OPTIONS)
    bound = {"float32": 1e-4, "float64": 1e-9}[dtype]
    for name, error in errors(got, want).items():
        assert error < bound, (name, error)


def test_probe_gradient():
    inputs = rows_of_their_own()
    want = exact(inputs, mechanism="parallax", rounded="float64", **OPTIONS)
    got = evaluate(inputs, FAST[0], mechanism="parallax", dtype="float64", **OPTIONS)
    for name, error in errors(got, want).items():
        assert error < 1e-12, (name, error)


def arrays(dtype):
    inputs = rows_of_their_own()
    return {n: jnp.asarray(inputs[n], dtype) for n in ("query", "key", "value", "ridge", "scale")}


def loss(inputs, implementation):
    out = lla.local_linear_attention(**inputs, implementation=implementation)
    return (jnp.sin(out)).sum()


@pytest.mark.parametrize("implementation", EVERY, ids=str)
def test_broadcast_parameters_sum_their_gradient(implementation):
    """A scalar, a per-head and a per-row ridge of equal value have matching gradients."""
    inputs = arrays("float32")

    def gradient(ridge):
        def total(ridge):
            out = lla.local_linear_attention(
                inputs["query"], inputs["key"], inputs["value"], ridge=ridge,
                implementation=implementation.name, solver=implementation.solver(),
            )  # fmt: skip
            return jnp.sin(out).sum()

        return jax.jit(jax.grad(total))(ridge)

    rows = gradient(jnp.full(SHAPE.rows, 0.7))
    # Sums of 24 or 48 float32 numbers of either sign.
    np.testing.assert_allclose(gradient(jnp.full(2, 0.7)), rows.sum((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient(jnp.float32(0.7)), rows.sum(), rtol=1e-4, atol=1e-6)


def test_reference_in_forward_mode():
    """The directional derivative equals the gradient's product with the direction."""
    with double_precision():
        inputs = arrays("float64")
        key = jax.random.key(0)
        tangents = {n: jax.random.normal(key, a.shape, a.dtype) for n, a in inputs.items()}
        function = functools.partial(loss, implementation="reference")
        _, slope = jax.jit(lambda p, t: jax.jvp(function, (p,), (t,)))(inputs, tangents)
        gradient = jax.jit(jax.grad(function))(inputs)
        want = sum((gradient[n] * tangents[n]).sum() for n in inputs)
        np.testing.assert_allclose(slope, want, rtol=1e-11)


def test_reference_has_second_derivatives():
    """A Hessian-vector product against differences of the gradient."""
    with double_precision():
        inputs = arrays("float64")
        key = jax.random.key(1)
        tangents = {n: jax.random.normal(key, a.shape, a.dtype) for n, a in inputs.items()}
        gradient = jax.jit(jax.grad(functools.partial(loss, implementation="reference")))
        product = jax.jit(lambda p, t: jax.jvp(gradient, (p,), (t,))[1])(inputs, tangents)

        def moved(step):
            return gradient({n: inputs[n] + step * tangents[n] for n in inputs})

        for name in inputs:
            difference = (moved(1e-5)[name] - moved(-1e-5)[name]) / 2e-5
            # Second-order differences: truncation and rounding are both about 1e-9 of the size.
            size = np.abs(difference).max()
            np.testing.assert_allclose(product[name], difference, rtol=0, atol=1e-6 * size)


SECOND = {
    "xla": None,
    "xla_tight": lla.Solver("cg", tol=1e-7),
    "xla_direct": lla.Solver("direct"),
    "xla_fixed": lla.Solver(num_iters=20),
    "xla_loose": lla.Solver("cg", tol=1e-2),
}
# Relative to the float64 reference: the rounding of float32, or what the tolerance allows.
SECOND_BOUNDS = {"xla_loose": 0.1}


@pytest.mark.parametrize("solver", SECOND)
@pytest.mark.parametrize("ridge", [1.0, 0.01])
def test_blockwise_second_derivatives(solver, ridge):
    """Forward over reverse, and reverse over reverse, against the reference in float64."""
    shape = Shape(12, 8, heads=2, key_heads=1)
    inputs = make_inputs(shape, ridge=ridge)
    names = ("query", "key", "value", "ridge", "scale")

    def products(implementation, dtype, solver=None):
        given = {n: jnp.asarray(inputs[n], dtype) for n in names}
        rng = np.random.default_rng(3)
        along = {n: jnp.asarray(rng.normal(size=a.shape), dtype) for n, a in given.items()}
        # A step along a ridge is small where the ridge is.
        along["ridge"] = along["ridge"] * given["ridge"]

        def loss(arrays):
            out = lla.local_linear_attention(
                **arrays, implementation=implementation, solver=solver, local_window_size=7
            )
            return jnp.sin(out).sum()

        def slope(arrays):
            gradient = jax.grad(loss)(arrays)
            return sum((gradient[n] * along[n]).sum() for n in names)

        @jax.jit
        def run(arrays):
            return jax.jvp(jax.grad(loss), (arrays,), (along,))[1], jax.grad(slope)(arrays)

        return jax.tree.map(np.asarray, run(given))

    with double_precision():
        want = products("reference", "float64")
    for got, right in zip(products("xla", "float32", SECOND[solver]), want, strict=True):
        for name in names:
            # At a small ridge the condition of the systems multiplies the rounding.
            bound = SECOND_BOUNDS.get(solver, 1e-4 if ridge == 1 else 1e-2)
            assert relative_error(got[name], right[name]) < bound, (solver, name)


def test_blockwise_hessian():
    """Of the ridges of few rows, which is diagonal; and third derivatives exist."""
    shape = Shape(6, 8, heads=2, key_heads=1)
    with double_precision():
        given = {n: jnp.asarray(a) for n, a in make_inputs(shape, ridge=0.3).items()}

        def loss(ridge, implementation):
            arrays = {n: given[n] for n in ("query", "key", "value", "scale")}
            out = lla.local_linear_attention(**arrays, ridge=ridge, implementation=implementation)
            return jnp.sin(out).sum()

        def matrix(implementation):
            function = jax.jit(jax.hessian(functools.partial(loss, implementation=implementation)))
            return np.asarray(function(given["ridge"])).reshape(12, 12)

        want, got = matrix("reference"), matrix("xla")
        assert relative_error(got, want) < 1e-9
        assert not (got - np.diag(np.diag(got))).any()

        def third(implementation):
            def curvature(ridge):
                gradient = jax.grad(functools.partial(loss, implementation=implementation))
                return jax.jvp(gradient, (ridge,), (jnp.ones_like(ridge),))[1].sum()

            return np.asarray(jax.jit(jax.grad(curvature))(given["ridge"]))

        assert relative_error(third("xla"), third("reference")) < 1e-9


@pytest.mark.parametrize("mechanism", ["parallax", "softmax"])
def test_blockwise_second_derivatives_of_the_other_mechanisms(mechanism):
    shape = Shape(12, 8, heads=2, key_heads=1)
    function = {"parallax": lla.parallax_attention, "softmax": lla.softmax_attention}[mechanism]
    names = ("query", "key", "value", "scale", *(("probe",) if mechanism == "parallax" else ()))
    with double_precision():
        given = {n: jnp.asarray(a) for n, a in make_inputs(shape).items() if n in names}

        def product(implementation):
            def loss(arrays):
                return jnp.sin(function(**arrays, implementation=implementation)).sum()

            return jax.jit(lambda a: jax.jvp(jax.grad(loss), (a,), (a,))[1])(given)

        want, got = product("reference"), product("xla")
        for name in names:
            assert relative_error(got[name], want[name]) < 1e-9, name


def test_kernels_refuse_second_derivatives_by_name():
    function = differentiation.refuse_derivative(
        lambda static, x: {"out": x * static}, "mosaic_gpu"
    )
    assert function(2.0, jnp.ones(3))["out"].tolist() == [2, 2, 2]
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu.*reference"):
        jax.jvp(functools.partial(function, 2.0), (jnp.ones(3),), (jnp.ones(3),))


def test_blockwise_forward_mode_is_an_error():
    inputs = arrays("float32")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(functools.partial(loss, implementation="xla"), (inputs,), (inputs,))


def test_reference_through_all_options_at_once_is_differentiable():
    """No path of the mask code breaks the gradient of the reference."""
    result = evaluate(rows_of_their_own(), REFERENCE, dtype="float64", **OPTIONS)
    assert all(np.isfinite(g).all() and g.any() for g in result.gradients.values())
