"""Statistics, the solver's options and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from tests.measure import relative_error
from tests.ops import oracles
from tests.ops.cases import SHAPES, Shape, make_inputs
from tests.ops.harness import EVERY, FAST, XLA_CG, evaluate, exact

SHAPE = Shape(70, 16, heads=2, key_heads=1, batch=(2,))
OPTIONS = {"key_value_seq_lengths": np.array([70, 0], np.int32)}
# One compilation serves several tests.
implementations = pytest.mark.parametrize("implementation", EVERY, ids=str)


@implementations
@pytest.mark.parametrize("mechanism", ["lla", "parallax", "softmax"])
def test_log_sum_exp(mechanism, implementation):
    if mechanism != "lla" and implementation.method == "direct":
        pytest.skip("no solver without a solve")
    inputs = make_inputs(SHAPE, "offset")
    stats = evaluate(inputs, implementation, mechanism=mechanism, **OPTIONS).stats
    valid = oracles.visible(SHAPE, **OPTIONS)
    key = np.repeat(inputs["key"], 2, axis=2)
    logits = np.einsum("btnh,bsnh,btn->bnts", inputs["query"], key, inputs["scale"])
    logits = np.where(valid, logits, -np.inf)
    with np.errstate(divide="ignore"):
        largest = np.where(valid.any(-1), np.where(valid, logits, -np.inf).max(-1), 0)
        want = largest + np.log(np.exp(logits - largest[..., None]).sum(-1))
    want = np.moveaxis(want, 1, 2)
    assert stats.lse.shape == SHAPE.rows
    assert stats.lse.dtype == np.float32
    assert (stats.lse[1] == -np.inf).all()
    # Logits up to about 100 in float32.
    np.testing.assert_allclose(stats.lse, want, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("implementation", FAST, ids=str)
def test_iterations_and_residual(implementation):
    inputs = make_inputs(SHAPE)
    stats = evaluate(inputs, implementation, **OPTIONS).stats
    assert stats.iterations.dtype == np.int32
    assert (stats.iterations[0] >= 1).all()
    assert stats.iterations.max() <= 64
    # No solve where there is no key.
    assert not stats.iterations[1].any()
    assert not stats.residual[1].any()
    # The default tolerance of 1e-6 is on the weights; residuals weigh errors differently.
    assert stats.residual[0].max() < 1e-3
    assert np.median(stats.residual[0]) < 2e-5


@pytest.mark.parametrize("mechanism", ["parallax", "softmax"])
def test_no_iterations_without_a_solve(mechanism):
    stats = evaluate(make_inputs(SHAPE), XLA_CG, mechanism=mechanism, **OPTIONS).stats
    assert not stats.iterations.any()
    assert not stats.residual.any()


@implementations
def test_statistics_carry_no_gradient(implementation):
    inputs = make_inputs(SHAPES["length_37"])
    query, key, value = (jnp.asarray(inputs[n], jnp.float32) for n in ("query", "key", "value"))

    def total(query):
        _, stats = lla.local_linear_attention(
            query, key, value, ridge=1.0, return_stats=True,
            implementation=implementation.name, solver=implementation.solver(),
        )  # fmt: skip
        return stats.lse.sum() + stats.residual.sum()

    assert not jax.jit(jax.grad(total))(query).any()


@pytest.mark.parametrize("implementation", FAST, ids=str)
def test_fixed_iterations_run_exactly_and_converge(implementation):
    inputs = make_inputs(SHAPE, ridge=1.0)
    want = exact(inputs)
    found = []
    # The direct method is at round-off after two, where a row with no residual left finishes.
    for count in (1, 3, 12) if implementation.method == "cg" else (1, 2):
        solver = implementation.solver(num_iters=count)
        got = evaluate(inputs, implementation, solver=solver)
        # A row may finish earlier only by reaching a zero residual, as the first row does.
        later = got.stats.iterations[:, 1:]
        assert got.stats.iterations.max() == count
        assert (later == count).mean() > 0.9
        found.append(relative_error(got.out, want.out))
    if implementation.method == "cg":
        assert found[0] > 10 * found[1] > 10 * found[2]
    assert found[-1] < 1e-5


def test_more_iterations_than_the_limit_are_not_run():
    """A limit below what the tolerance needs is kept, and the residual tells."""
    inputs = make_inputs(SHAPE, ridge=0.01)
    limited = evaluate(inputs, XLA_CG, solver=lla.Solver(method="cg", max_iters=2)).stats
    free = evaluate(inputs, XLA_CG).stats
    assert limited.iterations.max() == 2
    assert free.iterations.max() > 2
    assert limited.residual.max() > 10 * free.residual.max()


def test_backward_tolerance_is_its_own():
    inputs = make_inputs(SHAPE, ridge=0.1)
    want = exact(inputs)
    loose = evaluate(inputs, XLA_CG, solver=lla.Solver(method="cg", tol=1e-6, backward_tol=0.1))
    tight = evaluate(inputs, XLA_CG, solver=lla.Solver(method="cg", tol=1e-6, backward_tol=1e-6))
    np.testing.assert_array_equal(loose.out, tight.out)
    errors = [relative_error(r.gradients["query"], want.gradients["query"]) for r in (loose, tight)]
    assert errors[0] > 10 * errors[1]
    # A loose adjoint solve leaves alone what does not use it.
    np.testing.assert_array_equal(loose.gradients["value"], tight.gradients["value"])


@pytest.mark.parametrize("count", [1, 4])
def test_last_of_fixed_iterations_is_the_same_without_statistics(count):
    """Without statistics the last step forms no residual; the output must not notice."""
    inputs = make_inputs(SHAPE, ridge=1.0)
    arrays = [jnp.asarray(inputs[name], jnp.float32) for name in ("query", "key", "value")]
    solver = lla.Solver(method="cg", num_iters=count)

    def attend(with_stats):
        options = dict(ridge=1.0, implementation="xla", solver=solver, return_stats=with_stats)
        return jax.jit(lambda *a: lla.local_linear_attention(*a, **options))(*arrays)

    (with_stats, stats), without = attend(True), attend(False)
    np.testing.assert_allclose(with_stats, without, rtol=1e-5, atol=1e-6)
    # One more product would be needed for this residual: it must be that of the result.
    adaptive = lla.Solver(method="cg", tol=1e-12, max_iters=count)
    _, want = lla.local_linear_attention(
        *arrays, ridge=1.0, implementation="xla", solver=adaptive, return_stats=True
    )
    np.testing.assert_allclose(stats.residual, want.residual, rtol=1e-2, atol=1e-6)
