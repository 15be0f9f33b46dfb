"""The kernels of recurrences in the GPU interpreter, and lowered, against the recurrent forms.

Bounds of relative errors: 5e-3 for outputs and states, 1e-2 for gradients. Every factor of a
product is rounded by 1.7e-3 in the mean and independently of the others, and of two or three such
factors in a row the errors add up as squares. Conjugate gradients have two parts for each factor,
so that only the output and the gradients of 16-bit sequences are rounded.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the GPU interpreter needs JAX 0.11"
)

ROOT = Path(__file__).parents[2]
TIME_LIMIT = 300  # seconds
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
OUTPUTS = 2  # the first errors are those of outputs


def interpret(case: str, *arguments: str) -> dict:
    command = [sys.executable, "-m", "tests.kernels.interpret_mixers", case, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def check(case: str, *arguments: str):
    report = interpret(case, *arguments)
    assert report["races"] == 0 and report["kernels"] == 2
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
    """The text of the lowered layer, outputs and gradients, of two runs at once."""
    from flax import nnx

    from lla import mixers
    from lla.mixers import hopper
    from lla.ops import mosaic_gpu

    monkeypatch.setattr(mosaic_gpu, "_refuse_device", lambda: None)
    if unmeasured:
        monkeypatch.setattr(hopper, "_asked", 1)

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
    text = lower(name, monkeypatch)
    # Both solves of the mesa layer are one function.
    count = text.count("mosaic_gpu_v2") or text.count("mosaic_gpu")
    assert count >= (1 if name == "mesanet" else 2)


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
def test_what_the_kernels_do_not_serve_does_without(name, options, monkeypatch):
    assert "mosaic_gpu" not in lower(name, monkeypatch, **options)


@pytest.mark.compat
@pytest.mark.parametrize(
    "name, width",
    [
        ("gated_deltanet", 64),
        ("gated_deltanet", 128),
        ("gla", 64),
        ("linear", 64),
        ("linear", 128),
        ("mesanet", 64),
        ("mamba", 64),
    ],
)
def test_what_no_gpu_has_run_has_to_be_asked_for(name, width, monkeypatch):
    from lla.mixers import hopper

    assert "mosaic_gpu" in lower(name, monkeypatch, width=width, unmeasured=False)
    monkeypatch.setattr(hopper, "MEASURED", {})
    assert "mosaic_gpu" not in lower(name, monkeypatch, width=width, unmeasured=False)


def test_kernels_that_serve_by_themselves_are_measured():
    from lla.mixers import hopper

    file = ROOT / "experiments" / "benchmarks" / "results" / "mixer_updates_h200.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    # Of each kernel the mechanism whose update is timed, and the recurrence that is compared.
    measured = {
        "delta_rule": ("gated_deltanet", "gated_wide"),
        "linear": ("gla", "per_coordinate"),
        "mesa": ("mesanet", "mesa"),
        "retention": ("mamba2", "per_head_wide"),
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
        errors = found["header"]["operators"][operator]["bfloat16"]
        # The last is that of the gates of `linear`: sums of differences of products that nearly
        # cancel, each of which is rounded to 16 bits.
        gates = 1e-2 if operator == "per_coordinate" else 5e-3
        assert max(errors[:-1]) < 5e-3 and errors[-1] < gates
    assert not hopper.allowed("unknown", 32) and hopper.allowed("delta_rule", 64)
    with hopper.unmeasured_kernels():
        assert hopper.allowed("unknown", 32)
    assert not hopper.allowed("unknown", 32)
