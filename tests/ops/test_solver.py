"""Which solver `auto` takes, and that its table is what was measured."""

import jax
import jax.numpy as jnp
import pytest

import lla
from lla.experiments.benchmarks import hopper_solvers, solver_choice
from lla.experiments.benchmarks.results import RESULTS, load
from lla.ops import solver as policy
from lla.ops.problem import make_problem
from lla.ops.solver import DEFAULT_TOLERANCES

# Made up, so that these tests stay when measurements change.
TABLE = {"cpu": {"float32": {16: 1.0, 32: 0.1, 64: 0.0}, "bfloat16": {16: 0.5, 32: 0.0, 64: 0.0}}}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(policy, "CROSSINGS", TABLE)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


def choose(ridge, head_dim=16, dtype=jnp.float32, **options):
    array = jnp.ones((1, 3, 2, head_dim), dtype)
    solver = lla.Solver(**options)
    return policy.choose_method(
        make_problem("lla", array, array, array, ridge=ridge, solver=solver)
    )


@pytest.mark.parametrize("platform", [name for name in policy.CROSSINGS if name != "mosaic_gpu"])
def test_table_is_what_was_measured(platform):
    records = load(RESULTS / f"solver_choice_{platform}.json")["records"]
    want = {}
    for head_dim, dtype in {(r["head_dim"], r["dtype"]) for r in records}:
        found = solver_choice.measured_break_even(records, "forward_backward", head_dim, dtype)
        ridge = found["estimate"] or found["measured"] or 0.0
        want.setdefault(dtype, {})[head_dim] = float(f"{ridge:.2g}")
    assert want == policy.CROSSINGS[platform]


def test_table_of_the_kernels_is_what_was_measured():
    records = load(RESULTS / "hopper_solvers_h100.json")["records"]
    want = {}
    for head_dim in {r["head_dim"] for r in records}:
        found = hopper_solvers.crossing(records, head_dim)
        assert found["ridges"]
        want[head_dim] = float(f"{found['estimate'] or found['measured'] or 0.0:.2g}")
    assert policy.CROSSINGS["mosaic_gpu"] == {"bfloat16": want}


@pytest.mark.parametrize(("head_dim", "at"), [(16, 1.0), (8, 1.0), (17, 0.1), (32, 0.1)])
def test_both_sides_of_a_crossing(table, head_dim, at):
    assert policy.crossing(head_dim, 1e-6) == at
    assert choose(0.99 * at, head_dim) == "direct"
    assert choose(1.01 * at, head_dim) == "cg"
    # The smallest ridge decides.
    assert choose(jnp.asarray([[10.0, 0.99 * at]]), head_dim) == "direct"


def test_a_larger_head_dimension_than_measured(table):
    assert policy.crossing(65, 1e-6) == 0.0
    assert choose(1e-6, 65) == choose(1e-6, 64) == "cg"


def test_tolerance_is_interpolated(table):
    tight, loose = (DEFAULT_TOLERANCES[dtype][0] for dtype in ("float32", "bfloat16"))
    assert policy.crossing(16, (tight * loose) ** 0.5) == pytest.approx(0.75)
    assert policy.crossing(16, tight / 100) == 1.0
    assert policy.crossing(16, 10 * loose) == 0.5
    assert choose(0.6) == choose(0.6, dtype=jnp.bfloat16, tol=1e-6) == "direct"
    assert choose(0.6, dtype=jnp.bfloat16) == choose(0.6, tol=loose) == "cg"


def test_a_traced_ridge_is_unknown(table):
    methods = []
    jax.eval_shape(lambda ridge: methods.append(choose(ridge)) or ridge, jnp.float32(1e-3))
    assert methods == ["cg"]


def test_what_the_caller_says_counts(table):
    assert choose(1e-3, method="cg") == "cg"
    assert choose(10.0, 64, method="direct") == "direct"
    assert choose(1e-3, num_iters=4) == "cg"


def test_a_platform_without_measurements(table, monkeypatch):
    assert policy.crossing(16, 1e-6, "tpu") == 0.0
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose(1e-3) == "cg"


def test_the_choice_is_what_runs(table):
    """Iterations tell the methods apart: the direct one polishes with a single one."""
    inputs = jax.random.normal(jax.random.key(0), (3, 1, 40, 1, 16))
    runs = ({}, {"method": "direct"}, {"method": "cg"})

    @jax.jit
    def iterations(inputs):
        return [
            lla.local_linear_attention(
                *inputs, ridge=0.01, implementation="xla", return_stats=True,
                solver=lla.Solver(**options),
            )[1].iterations
            for options in runs
        ]  # fmt: skip

    chosen, direct, cg = (count.tolist() for count in iterations(inputs))
    assert chosen == direct != cg
