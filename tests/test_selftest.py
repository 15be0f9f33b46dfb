"""The self test passes on this machine, and does not pass with a broken implementation."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from lla import selftest

TINY = selftest.Case("tiny", (1, 9, 2, 8), (1, 9, 1, 8), 4, {}, methods=("direct",))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(selftest, "QUICK_CASES", (TINY,))


def patch_xla(monkeypatch, wrapper):
    """Replaces the blockwise implementation by ``wrapper(attend, **arguments)``."""
    attend = lla.local_linear_attention

    def patched(**arguments):
        if arguments["implementation"] == "xla":
            return wrapper(attend, **arguments)
        return attend(**arguments)

    monkeypatch.setattr(lla, "local_linear_attention", patched)


def wrong_output(attend, **arguments):
    return attend(**arguments) * (1 + 1e-3)


def wrong_ridge_gradient(attend, ridge, **arguments):
    return attend(ridge=1.01 * ridge - jax.lax.stop_gradient(0.01 * ridge), **arguments)


def not_finite(attend, **arguments):
    return attend(**arguments).at[0, 3].set(jnp.nan)


def crash(attend, **arguments):
    raise TypeError("broken on purpose")


def refuse(attend, **arguments):
    raise NotImplementedError("not today")


def run(tmp_path, *arguments):
    """Exit status and rows of the report by implementation."""
    file = tmp_path / "report.json"
    status = selftest.main(["--quick", "--json", str(file), *arguments])
    report = json.loads(file.read_text())
    assert report["passed"] == (status == 0)
    return status, report["results"]


def test_quick_run_passes_and_covers_the_family(tmp_path):
    file = tmp_path / "report.json"
    strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    process = subprocess.run(
        [sys.executable, "-m", "lla.selftest", "--quick", "--json", str(file)],
        capture_output=True, text=True, check=False, env=os.environ | strict,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    assert "mosaic_tpu: not available, the kernels need a TPU" in process.stdout
    report = json.loads(file.read_text())
    assert report["environment"]["jax"] == jax.__version__
    rows = report["results"]
    assert {row["status"] for row in rows} == {"pass"}
    assert {(row["mechanism"], row["implementation"], row["method"]) for row in rows} == {
        ("lla", "reference", None),
        ("lla", "xla", "cg"),
        ("lla", "xla", "direct"),
        ("parallax", "reference", None),
        ("parallax", "xla", None),
        ("softmax", "reference", None),
        ("softmax", "xla", None),
    }
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(row["milliseconds"] > 0 for row in rows)


@pytest.mark.parametrize(
    "wrapper, reason, gradient",
    [
        (wrong_output, "bound", None),
        (wrong_ridge_gradient, "bound", "ridge"),
        (not_finite, "bound", None),
        (crash, "TypeError: broken on purpose", None),
    ],
)
def test_broken_implementation_fails(
    wrapper, reason, gradient, tiny, monkeypatch, tmp_path, capsys
):
    patch_xla(monkeypatch, wrapper)
    status, rows = run(tmp_path)
    assert status == 1
    for row in rows:
        broken = row["implementation"] == "xla"
        assert row["status"] == ("FAIL" if broken else "pass")
        if broken:
            assert reason in row["reason"]
        if broken and gradient:
            assert row["gradient"] == gradient and row["error"] <= row["bound"]
    assert "FAIL: 2 within their bounds, 2 failed, 0 refused" in capsys.readouterr().out


def test_a_step_of_decoding_is_held_to_the_operator(monkeypatch):
    case = selftest.Case("step", (2, 1, 2, 8), (2, 9, 1, 8), 4, {}, step=True)
    reference = selftest.Reference()

    def rows(mechanism):
        return list(
            selftest.run_variant(case, mechanism, "float32", "reference", None, (0.5,), reference)
        )

    assert [row.status for mechanism in selftest.FUNCTIONS for row in rows(mechanism)] == [
        "pass"
    ] * 3
    step = lla.decode_step
    monkeypatch.setattr(lla, "decode_step", lambda *_, **given: (1.01 * step(**given)[0], None))
    assert [row.status for row in rows("lla")] == ["FAIL"]


def test_refusal_is_shown_and_is_no_success_alone(tiny, monkeypatch, tmp_path, capsys):
    patch_xla(monkeypatch, refuse)
    status, rows = run(tmp_path)
    assert status == 0 and {row["status"] for row in rows} == {"pass", "refused"}
    assert "refused: not today" in capsys.readouterr().out
    assert run(tmp_path, "--implementation", "xla")[0] == 1
    assert run(tmp_path, "--implementation", "mosaic_gpu") == (1, [])


def test_reference_is_float64_and_bounds_are_as_documented(tiny):
    out, gradients = selftest.Reference()(TINY, "lla", "bfloat16", 0.5)
    assert out.dtype == np.float64 and gradients["ridge"].dtype == np.float64
    assert gradients["ridge"].shape == (1, 9, 2)
    bounds = {10.0: 1e-5, 1.0: 1e-5, 0.5: 1e-4, 0.1: 1e-4, 0.01: 1e-3, None: 1e-5}
    for ridge, bound in bounds.items():
        assert selftest.error_bound(out, "float32", ridge, gradient=False) == bound
        assert selftest.error_bound(out, "float32", ridge, gradient=True) == 10 * bound
    exact = np.array([1.0, 1.0 + 2.0**-10])  # the second rounds to 1
    error = 2.0**-10 / np.linalg.norm(exact)
    for ridge in (10.0, 0.1, 0.01):
        assert selftest.error_bound(exact, "bfloat16", ridge, False, "mosaic_gpu") == 5e-3
        assert selftest.error_bound(exact, "bfloat16", ridge, True, "mosaic_gpu") == 2e-2
        plain = selftest.error_bound(exact, "float32", ridge, True)
        assert selftest.error_bound(exact, "float32", ridge, True, "mosaic_tpu") == plain
    assert selftest.error_bound(exact, "bfloat16", 1.0, False) == pytest.approx(2 * error + 1e-5)


def test_cases_differ_by_name_and_cover_every_mask():
    assert len({case.name for case in selftest.CASES}) == len(selftest.CASES)
    options = {name for case in selftest.CASES for name in case.options}
    assert options == {"is_causal", "local_window_size", "key_value_seq_lengths"}


@pytest.mark.slow
def test_everything_that_runs_here_is_within_its_bounds():
    assert selftest.main(["--implementation", "xla"]) == 0


def test_report_is_named_after_the_machine(tmp_path, monkeypatch):
    """What a user with a card that nothing has run on sends: also why kernels do not serve."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selftest, "run_cases", lambda *arguments: iter(()))
    assert selftest.main(["--quick", "--report", "--implementation", "mosaic_gpu_portable"]) == 1
    (file,) = tmp_path.iterdir()
    assert file.name == selftest.report_name() and jax.__version__ in file.name
    report = json.loads(file.read_text())
    assert "compute_capability" in report["environment"]
    assert "NVIDIA" in report["implementations"]["mosaic_gpu_portable"]
