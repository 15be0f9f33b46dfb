"""The recurrent kernels in the GPU interpreter against the recurrent forms; and lowered for a GPU.

Relative errors are at most 5e-3 for outputs and states, and 1e-2 for gradients. Rounding changes an
operand of a product by 1.7e-3 on average, independently of the others, and the squares of the
errors of two or three successive products add up. Conjugate gradients use two parts for every
operand, so that only their 16-bit results are rounded.
"""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.subprocesses import ROOT, run_json

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the GPU interpreter needs JAX 0.11"
)

TIME_LIMIT = 300  # seconds
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
OUTPUTS = 2  # the first errors are those of outputs


def check(case: str, *arguments: str):
    report = run_json("interpret_mixers", case, *arguments, timeout=TIME_LIMIT)
    assert report["kernels"] > 0 and report["races"] == 0
    outputs, gradients = report["errors"][:OUTPUTS], report["errors"][OUTPUTS:]
    exact = case == "mesa"
    assert max(outputs) < (2e-3 if exact else 5e-3)
    assert max(gradients) < (2e-3 if exact else 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "delta",
        "delta_blocks",
        "delta_128",
        "linear",
        "linear_strong",
        "linear_blocks",
        "retention",
        "retention_shared",
        "retention_128",
        "mesa",
        "scan",
    ],
)
def test_equals_the_recurrent_form(case):
    """Padded tokens and coordinates, several blocks of values, gates of e^-1000."""
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["delta", "linear", "retention_shared", "mesa", "scan"])
def test_mapped_over_runs(case):
    check(case, "--mapped")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["delta", "linear", "retention_shared", "mesa", "scan"])
def test_no_races(case):
    check(case, "--races")


def lower(name, monkeypatch, *, width=64, heads=1, unmeasured=True, **options):
    """The lowered text of a layer's outputs and gradients, mapped over two runs."""
    from flax import nnx

    from lla import mixers
    from lla.mixers import hopper
    from lla.ops.mosaic_gpu import hopper as mosaic_gpu

    monkeypatch.setattr(mosaic_gpu, "_refuse_device", lambda: None)
    if unmeasured:
        monkeypatch.setattr(hopper, "_enabled", 1)

    def build():
        return mixers.create(name, width, heads, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, **options)

    graph, params = nnx.split(nnx.eval_shape(build), nnx.Param)
    x = jax.ShapeDtypeStruct((2, 2, 100, width), jnp.bfloat16)

    def run(params, x):
        out, pullback = jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)
        return out, pullback(out)

    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), params)
    traced = jax.jit(jax.vmap(run)).trace(params, x)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gated_deltanet", marks=pytest.mark.compat),
        *(slow(name) for name in ("deltanet", "gla", "linear", "mesanet", "mamba", "mamba2")),
    ],
)
def test_layers_lower_to_kernels_mapped_over_runs(name, monkeypatch):
    assert "mosaic_gpu" in lower(name, monkeypatch)


@pytest.mark.compat
@pytest.mark.parametrize(
    "name, options",
    [
        ("gated_deltanet", dict(head_dim=160)),
        ("mamba", dict(state_size=8)),
        ("mesanet", dict(head_dim=32)),
        ("gla", dict(form="recurrent")),
    ],
)
def test_unsupported_layers_use_no_kernels(name, options, monkeypatch):
    assert "mosaic_gpu" not in lower(name, monkeypatch, **options)


@pytest.mark.compat
@pytest.mark.parametrize(
    "name, width",
    [
        ("gated_deltanet", 64),
        ("gated_deltanet", 128),
        ("gla", 64),
        ("linear", 64),
        ("mamba2", 64),
        ("mesanet", 64),
        ("mamba", 64),
    ],
)
def test_kernels_without_measurements_are_opt_in(name, width, monkeypatch):
    from lla.mixers import hopper

    assert "mosaic_gpu" in lower(name, monkeypatch, width=width, unmeasured=False)
    monkeypatch.setattr(hopper, "MEASURED", {})
    assert "mosaic_gpu" not in lower(name, monkeypatch, width=width, unmeasured=False)


def test_default_kernels_are_measured():
    """`hopper.MEASURED` lists what the committed measurement contains."""
    from lla.mixers import hopper

    file = ROOT / "experiments" / "benchmarks" / "results" / "mixer_updates_h200.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    # For each kernel, the mixer whose update is timed and the recurrence whose errors are measured.
    measured = {
        "delta_rule": ("gated_deltanet", "gated_wide"),
        "linear": ("gla", "per_coordinate"),
        "mesa": ("mesanet", "mesa"),
        "retention": ("mamba2", "per_head"),
        "retention_shared": ("mamba2", None),
        "selective_scan": ("mamba", "selective_scan"),
    }
    assert hopper.MEASURED.keys() == measured.keys()
    for mechanism, operator in measured.values():
        (update,) = (
            record
            for record in found["records"]
            if (record["implementation"], record["pass"]) == (mechanism, "update")
        )
        assert update["status"] == "timed"
        if operator is None:
            continue
        errors = found["header"]["operators"][operator]["bfloat16"]
        # The last error of `linear` is that of its gates, which sum differences of 16-bit products
        # that nearly cancel.
        gates = 1e-2 if operator == "per_coordinate" else 5e-3
        assert max(errors[:-1]) < 5e-3 and errors[-1] < gates
    assert not hopper.allowed("unknown", 32) and hopper.allowed("delta_rule", 64)
    with hopper.unmeasured_kernels():
        assert hopper.allowed("unknown", 32)
    assert not hopper.allowed("unknown", 32)
