"""The benchmark of the Hopper kernels' stages: arithmetic, tables, tracing, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lla.experiments.benchmarks import hopper_stages, results

SIZE = (1, 2, 256, 64)


def needs_kernels(function):
    """Skips with JAX 0.10, and is therefore in the pass with another version, too."""
    skip = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
    return pytest.mark.compat(skip(function))


def made_up(batch=2, heads=2):
    """A document in which a unit takes 3 ms, and one failure."""
    options = hopper_stages.parse([f"--batch={batch}", f"--heads={heads}", "--length=1024"])
    settings = {name: getattr(options, name) for name in hopper_stages.SETTINGS}
    header = results.make_header("hopper_stages", settings)
    stamp = {"commit": "abc", "date": "2000-01-01"}
    records = []
    for call in hopper_stages.make_calls(options):
        units = hopper_stages.units(call.stage, call.iterations)
        seconds = 3e-3 * units * (call.heads / heads)
        record = {
            **call.fields(), **stamp, "status": "timed", "errors": {}, "bounds": {},
            "truth": "none", "time_min_s": seconds, "time_median_s": seconds, "repeats": 3,
            "flops": hopper_stages.flops(units, *call.size),
        }  # fmt: skip
        if (call.stage, call.head_dim) == ("softmax", 128):
            record = {**call.fields(), **stamp, "status": "unavailable", "reason": "made up"}
        results.check_record(record)
        records.append(record)
    size = {"batch": 1, "heads": 1, "n": 10, "head_dim": 10, "iterations": 0, "flops": 2e9}
    matmul = {**records[0], "stage": "matmul", **size, "time_median_s": 1e-3, "time_min_s": 1e-3}
    return {"header": header, "records": [*records, matmul]}


def test_slope_and_units():
    # The call without iterations is a different program, and no point of the line.
    assert hopper_stages.slope({0: 7.0, 1: 3.0, 3: 7.0, 5: 11.0}) == pytest.approx(2.0)
    assert hopper_stages.slope({1: 1.0, 3: 1.0, 5: 4.0}) == pytest.approx(0.75)
    assert hopper_stages.slope({0: 1.0, 5: 4.0}) is None
    # Three products of 8 x 8 pairs of vectors of 4 numbers, half of them visible, in 2 x 3 heads.
    assert hopper_stages.flops(3, 2, 3, 8, 4) == 3 * (2 * 3) * (2 * 8 * 8 * 4 / 2)


def test_calls():
    calls = hopper_stages.make_calls(hopper_stages.parse([]))
    assert len(calls) == len(set(calls))
    counts = {c.iterations for c in calls if c.stage == "solve"}
    assert 0 in counts and len(counts) > 2  # a first pass, and a line through the others
    heads = {c.batch * c.heads for c in calls if (c.stage, c.iterations) == ("solve", 3)}
    assert len(heads) > 1  # for the balance of load


def test_table():
    lines = hopper_stages.markdown(made_up()).splitlines()
    assert "Matrix product on the same card: 2 TFLOP/s." in lines
    # A unit of 4 heads, n = 1024 and d = 64 in 3 ms: 0.0895 TFLOP/s, 4 % of the matrix product.
    assert "| iteration | 9.000 | 0 | 4% |" in lines
    assert "| first pass | 6.000 | 0 | 4% |" in lines
    assert "| 64 | solve, 3 iterations | 4 | 33.000 | 8250.00 | 0 |" in lines
    assert "| 64 | solve, 3 iterations | 16 | 132.000 | 8250.00 | 0 |" in lines
    assert "- softmax, full, 0 iterations, head dimension 128: unavailable: made up" in lines


def test_without_a_gpu(tmp_path, capsys):
    path = tmp_path / "stages.json"
    assert hopper_stages.main([f"--output={path}"]) == 1
    assert "need" in capsys.readouterr().err and not path.exists()


@needs_kernels
@pytest.mark.parametrize("stage", hopper_stages.FIRST)
def test_every_stage_can_be_traced(stage):
    """With the operands that it is given, and with those of a solve before it."""
    call = hopper_stages.StageCall(stage, hopper_stages.FULL, 0, *SIZE)
    shapes = hopper_stages.shapes_of(call)
    drawn = jax.eval_shape(lambda: hopper_stages.draw_operands(SIZE, 1.0, 0))
    completed = jax.eval_shape(lambda given: hopper_stages.complete(SIZE, given), drawn)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), completed) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )
    needed = hopper_stages.needed(call, shapes)
    jax.eval_shape(lambda given: hopper_stages.run_stage(call, given), needed)


@dataclasses.dataclass
class Result:
    log_sum_exp: jax.Array


jax.tree_util.register_dataclass(Result, ["log_sum_exp"], [])


def test_what_is_wrong_is_not_timed():
    given = hopper_stages.draw_operands((1, 2, 128, 8), 10.0, 0)
    want = hopper_stages.exact(given)
    query, key, value = (np.asarray(a[0, :, 0], np.float64) for a in given[:3])
    weights = np.tril(np.exp(query @ key.T * 8**-0.5))
    np.testing.assert_allclose(want["log_sum_exp"], np.log2(weights.sum(1)), atol=1e-6)
    softmax = weights / weights.sum(1, keepdims=True) @ value
    np.testing.assert_allclose(want["softmax"], softmax, atol=1e-6)
    call = hopper_stages.StageCall("solve", hopper_stages.FULL, 1, 1, 2, 128, 8)
    row = jnp.asarray(want["log_sum_exp"], jnp.float32)[None, None]
    for factor, infinite, status in (
        (1.001, False, "timed"),
        (1.02, False, "refused"),
        (1, True, "refused"),
    ):
        other_head = row.at[..., 0].set(jnp.inf if infinite else 0)
        found = Result(jnp.concatenate([factor * row, other_head], 1))
        judged = hopper_stages.verdict(call, found, want)
        assert judged["status"] == status and judged["finite"] != infinite
