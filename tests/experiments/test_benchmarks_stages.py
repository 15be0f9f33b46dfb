"""The benchmark of the Hopper kernels' stages: arithmetic, table, and what the variants lack."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

NAMES = (
    "measure", "subjects", "report", "hopper_tables", "hopper_cells", "hopper", "stages_tables",
    "hopper_stages",
)  # fmt: skip


def needs_kernels(function):
    """Skips with JAX 0.10, and is therefore in the pass with another version, too."""
    skip = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11")
    return pytest.mark.compat(skip(function))


SIZE = (1, 2, 256, 64)


def primitives(jaxpr, found=None):
    """How often a program, with all that is inside, holds each primitive."""
    found = {} if found is None else found
    for equation in jaxpr.eqns:
        found[equation.primitive.name] = found.get(equation.primitive.name, 0) + 1
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                primitives(inner, found)
    return found


def made_up(bench, batch=2, heads=2):
    """A document in which a unit takes 3 ms, less a third of a variant; and one failure."""
    options = bench.hopper_stages.parse([f"--batch={batch}", f"--heads={heads}", "--length=1024"])
    header = bench.hopper_stages.make_header(options)
    stamp = {"commit": "abc", "date": "2000-01-01"}
    records = []
    for cell in bench.hopper_stages.make_cells(options):
        units = bench.stages_tables.units(cell.stage, cell.iterations)
        seconds = 3e-3 * units * (cell.heads / heads)
        seconds *= 1 if cell.variant == "full" else 2 / 3
        record = {
            **cell.fields(), **stamp, "status": "timed", "errors": {}, "bounds": {},
            "truth": "none", "time_min_s": seconds, "time_median_s": seconds, "repeats": 3,
            "flops": bench.stages_tables.flops(units, *cell.size),
        }  # fmt: skip
        if (cell.stage, cell.variant, cell.head_dim) == ("softmax", "no_exp", 128):
            record = {**cell.fields(), **stamp, "status": "unavailable", "reason": "made up"}
        bench.measure.check_record(record)
        records.append(record)
    size = {"batch": 1, "heads": 1, "n": 10, "head_dim": 10, "iterations": 0, "flops": 2e9}
    matmul = {**records[0], "stage": "matmul", **size, "time_median_s": 1e-3, "time_min_s": 1e-3}
    return {"header": header, "records": [*records, matmul]}


def test_slope_and_units(bench):
    tables = bench.stages_tables
    # The call without iterations is a different program, and no point of the line.
    assert tables.slope({0: 7.0, 1: 3.0, 3: 7.0, 5: 11.0}) == pytest.approx(2.0)
    assert tables.slope({1: 1.0, 3: 1.0, 5: 4.0}) == pytest.approx(0.75)
    assert tables.slope({0: 1.0, 5: 4.0}) is None
    assert [tables.units("solve", t) for t in (0, 1, 3)] == [2, 5, 11]
    assert [tables.units("solve_precise", t) for t in (0, 1)] == [3, 8]
    assert [tables.units("adjoint", t) for t in (0, 1)] == [3, 6]
    assert [tables.units(s, 0) for s in ("softmax", "one_part", "two_parts", "precise")] == [
        2, 3, 4, 6,
    ]  # fmt: skip
    # Three products of 8 x 8 pairs of vectors of 4 numbers, half of them visible, in 2 x 3 heads.
    assert tables.flops(3, 2, 3, 8, 4) == 3 * (2 * 3) * (2 * 8 * 8 * 4 / 2)


def test_cells(bench):
    cells = bench.hopper_stages.make_cells(bench.hopper_stages.parse([]))
    assert len(cells) == len(set(cells))
    found = {c[:3] for c in cells}
    assert {("solve", "full", t) for t in (0, 1, 3, 5)} <= found
    assert ("adjoint", "no_scores_product", 0) in found
    assert ("solve", "no_scores_product", 0) not in found
    assert ("softmax", "no_scores_product", 0) not in found
    (alone,) = {
        c.variant for c in bench.hopper_stages.make_cells(bench.hopper_stages.parse(["--variants"]))
    }
    assert alone == "full"
    more = {c.batch * c.heads for c in cells if c[:3] == ("solve", "full", 3)}
    assert more == {32, 64, 128}


def test_table(bench):
    text = bench.stages_tables.markdown(made_up(bench))
    assert "Matrix product on the same card: 2 TFLOP/s." in text
    # A unit of 4 heads, n = 1024 and d = 64 in 3 ms: 0.0895 TFLOP/s.
    lines = text.splitlines()
    assert "on the border of the mask, 22% of all" in text
    without = " | 6.000 (-33%)" * 4
    assert any(line.startswith("| iteration | 9.000 | 0 | 4%" + without) for line in lines)
    assert any(line.startswith("| first pass | 6.000 | 0 | 4% | 4.000 (-33%)") for line in lines)
    assert any(line.startswith("| output without a probe (softmax) | 6.000 | 0 | 9% |  | 4.000")
               for line in lines)  # fmt: skip
    assert "| 64 | solve, 3 iterations | 4 | 33.000 | 8250.00 | 0 |" in lines
    assert "| 64 | solve, 3 iterations | 16 | 132.000 | 8250.00 | 0 |" in lines
    assert "- softmax, no_exp, 0 iterations, head dimension 128: unavailable: made up" in lines


def test_without_a_gpu(bench, tmp_path, capsys):
    path = tmp_path / "stages.json"
    assert bench.hopper_stages.main([f"--output={path}"]) == 1
    assert "need" in capsys.readouterr().err and not path.exists()


def counted(bench, stage, variant, iterations=0):
    """Exponentials, products and copies of a traced call."""
    cell = bench.hopper_stages.Cell(stage, variant, iterations, *SIZE)
    found = primitives(bench.hopper_stages.trace(cell).jaxpr)
    return [found.get(name, 0) for name in ("exp2", "wgmma_ref", "copy_gmem_to_smem")]


@needs_kernels
def test_what_variants_lack(bench):
    """Every kernel has a loop over full tiles and one over those on the border of the mask."""
    # Of a tile: the weights, and what rescales the sums; logits, and the sum.
    *full, copies = counted(bench, "softmax", "full")
    assert full == [4, 4]
    assert counted(bench, "softmax", "no_exp") == [3, 4, copies]
    assert counted(bench, "softmax", "no_sum_product") == [4, 3, copies]
    # The product along the probe, too, with two parts.
    assert counted(bench, "two_parts", "full")[:2] == [2, 8]
    assert counted(bench, "two_parts", "no_exp")[:2] == [1, 8]
    assert counted(bench, "two_parts", "no_sum_product")[:2] == [2, 7]
    assert counted(bench, "two_parts", "no_scores_product")[:2] == [2, 4]
    assert counted(bench, "precise", "no_sum_product")[:2] == [2, 9]  # of 12
    # A product with ones makes the sums of the weights of an iteration.
    lacking = {"full": (2, 8), "no_exp": (1, 8), "no_sum_product": (2, 7)}
    lacking |= {"no_scores_product": (2, 6), "no_weights": (1, 7)}
    for stage in ("solve", "adjoint"):
        for variant, iteration in lacking.items():
            first, whole = (counted(bench, stage, variant, t) for t in (0, 1))
            assert (whole[0] - first[0], whole[1] - first[1]) == iteration


@needs_kernels
@pytest.mark.parametrize(
    "variant", ["no_exp", "no_sum_product", "no_scores_product", "no_reload", "no_weights"]
)
def test_patches_are_undone(bench, variant):
    from lla.kernels.mosaic_gpu.launch import Ring
    from lla.kernels.mosaic_gpu.query_rows import QueryRows
    from lla.kernels.mosaic_gpu.tile import Arithmetic

    def names():
        return [dict(vars(owner)) for owner in (QueryRows, Arithmetic, Ring)]

    before, plain = names(), counted(bench, "two_parts", "full")
    with pytest.raises(ZeroDivisionError), bench.hopper_stages.left_out(variant):
        assert names() != before
        raise ZeroDivisionError
    assert names() == before
    counted(bench, "two_parts", variant)
    assert names() == before and counted(bench, "two_parts", "full") == plain


@needs_kernels
def test_what_a_call_reads(bench):
    """All operands give the same program as those that are kept for a cell."""
    stages = bench.hopper_stages
    for stage in bench.stages_tables.FIRST:
        cell = stages.Cell(stage, "full", 0, *SIZE)
        every = jax.make_jaxpr(lambda given, cell=cell: stages.run_stage(cell, given))(
            stages.shapes_of(cell)
        )
        assert primitives(every.jaxpr) == primitives(stages.trace(cell).jaxpr)


@needs_kernels
def test_drawn_and_completed_operands_have_the_shapes_of_programs(bench):
    stages = bench.hopper_stages
    cell = stages.Cell("adjoint", "full", 0, *SIZE)
    drawn = jax.eval_shape(lambda: stages.draw(SIZE, 1.0, 0))
    got = jax.eval_shape(lambda given: stages.complete(SIZE, given), drawn)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), got) == jax.tree.map(
        lambda a: (a.shape, a.dtype), stages.shapes_of(cell)
    )


@dataclasses.dataclass
class Result:
    log_sum_exp: jax.Array


jax.tree_util.register_dataclass(Result, ["log_sum_exp"], [])


def test_what_is_wrong_is_not_timed(bench):
    stages = bench.hopper_stages
    given = stages.draw((1, 2, 128, 8), 10.0, 0)
    want = stages.exact(given)
    query, key, value = (np.asarray(a[0, :, 0], np.float64) for a in given[:3])
    weights = np.tril(np.exp(query @ key.T * 8**-0.5))
    np.testing.assert_allclose(want["log_sum_exp"], np.log2(weights.sum(1)), atol=1e-6)
    softmax = weights / weights.sum(1, keepdims=True) @ value
    np.testing.assert_allclose(want["softmax"], softmax, atol=1e-6)
    assert want["output"].shape == (128, 8)
    cell = stages.Cell("solve", "full", 1, 1, 2, 128, 8)
    row = jnp.asarray(want["log_sum_exp"], jnp.float32)[None, None]
    for factor, finite, status in ((1.001, 0, "timed"), (1.02, 0, "refused"), (1, 1, "refused")):
        found = jnp.concatenate([factor * row, row.at[..., 0].set(jnp.inf if finite else 0)], 1)
        judged = stages.verdict(cell, Result(found), want)
        assert judged["status"] == status and judged["finite"] != bool(finite)
    wrong = stages.verdict(cell._replace(variant="no_exp"), Result(2 * row), want)
    assert wrong["status"] == "timed" and wrong["errors"] == {}
