"""The exact biases against theory and brute force, the job end to end, and its README."""

import json

import numpy as np
import pytest

from lla.experiments.bias_exponents import population, summary
from tests.experiments.scripts import ROOT, run, table

FOLDER = ROOT / "experiments" / "bias_exponents"
RESULTS = FOLDER / "results" / "full"
DRAWN = ("summary.csv", "figure.png", "figure.svg")


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("name", ["sine", "exponential", "rational"])
def test_exponents(name, dim):
    bandwidths = np.geomspace(5e-4, 4e-3, 4)
    each = [population.squared_bias(population.TARGETS[name], dim, b) for b in bandwidths]
    for fit, wanted in (("constant", (3, 2)), ("linear", (4, 4))):
        for quantity, power in zip(("integrated", "boundary"), wanted, strict=True):
            amounts = [biases[fit][quantity] for biases in each]
            assert abs(population.exponent(bandwidths, amounts) - power) < 0.06


def test_what_the_exponents_depend_on():
    bandwidths = np.geomspace(5e-4, 2e-3, 3)

    def exponent(name, fit, ridge):
        target = population.TARGETS[name]
        each = [population.squared_bias(target, 1, b, ridge(b)) for b in bandwidths]
        return population.exponent(bandwidths, [biases[fit]["integrated"] for biases in each])

    # Without a slope at the ends the local-constant fit has no layer there. A ridge takes the slope
    # away where the keys within a bandwidth vary less than it.
    assert abs(exponent("flat_ends", "constant", lambda b: 0.0) - 4) < 0.05
    assert abs(exponent("sine", "linear", lambda b: 1e-4) - 3) < 0.1
    assert abs(exponent("sine", "linear", lambda b: 0.1 * b**3) - 4) < 0.05


@pytest.mark.parametrize("name", ["sine", "exponential", "rational"])
def test_leading_terms(name):
    target, bandwidth = population.TARGETS[name], 5e-4
    theory = population.leading_terms(target, bandwidth)
    for fit, terms in population.squared_bias(target, 1, bandwidth).items():
        for quantity, amount in terms.items():
            assert amount == pytest.approx(theory[fit][quantity], rel=0.01)


def test_derivatives_of_the_targets():
    x, step = np.linspace(0, 1, 11), 1e-5
    for target in population.TARGETS.values():
        for function, derivative in (
            (target.value, target.slope),
            (target.slope, target.curvature),
        ):
            central = (function(x + step) - function(x - step)) / (2 * step)
            np.testing.assert_allclose(derivative(x), central, atol=1e-6)


def test_linear_data_have_no_bias_in_the_linear_fit_alone():
    line = population.Target(lambda x: 3 * x - 1, np.ones_like, np.zeros_like)
    biases = population.squared_bias(line, 1, 0.1)
    assert biases["linear"]["integrated"] < 1e-28 < 1e-6 < biases["constant"]["integrated"]


def test_product_formula_against_a_plane_of_keys():
    """Weighted least squares over a grid of quadrature points in the unit square."""
    target, bandwidth, ridge = population.TARGETS["exponential"], 0.15, 1e-3
    node, weight = population._panels(np.linspace(0, 1, 9))
    keys = np.stack(np.meshgrid(node, node, indexing="ij"), axis=-1).reshape(-1, 2)
    values = target.value(keys).prod(axis=1)
    places, measure = population._panels(np.linspace(0, 1, 4))
    queries = np.stack(np.meshgrid(places, places, indexing="ij"), axis=-1).reshape(-1, 2)
    biases = {fit: [] for fit in population.FITS}
    for query in queries:
        offset = keys - query
        p = np.outer(weight, weight).ravel()
        p = p * np.exp(-(offset**2).sum(axis=1) / (2 * bandwidth**2))
        p /= p.sum()
        design = np.column_stack([np.ones(len(keys)), offset])
        penalty = ridge * np.diag([0.0, 1, 1])
        fit = np.linalg.solve((p[:, None] * design).T @ design + penalty, design.T @ (p * values))
        biases["linear"].append(fit[0] - target.value(query).prod())
        biases["constant"].append(p @ values - target.value(query).prod())
    found = population.squared_bias(target, 2, bandwidth, ridge)
    for name, bias in biases.items():
        total = np.outer(measure, measure).ravel() @ np.square(bias)
        assert found[name]["integrated"] == pytest.approx(total, rel=1e-6)


def test_smoke_and_resume(tmp_path):
    """From a folder without the repository: the config is named, the script is a module."""
    flags = ("--config=bias_exponents:smoke", f"--workdir={tmp_path}")
    done = run("-m", "lla.experiments.run_study", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr and str(tmp_path / "figure.png") in done.stdout
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "uncommitted_changes" in json.loads((tmp_path / "environment.json").read_text())
    rows = table(tmp_path)
    assert {row["kind"] for row in rows} == {"integrals", "grid", "random"}
    # The operators of `lla` have the bias of the integral.
    worst = [float(row["value"]) for row in rows if row["quantity"] == "worst_difference"]
    assert len(worst) == 4 and max(worst) < 1e-3

    # A killed run: half of a record is missing, and the file ends there. It is computed again.
    first = {name: (tmp_path / name).read_bytes() for name in (*DRAWN, "metrics.jsonl")}
    torn, *whole = first["metrics.jsonl"].splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(whole) + torn[:-99])
    again = run("-m", "lla.experiments.run_study", *flags, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "3 trials, 2 already finished" in again.stdout
    for name in ("metrics.jsonl", "summary.csv"):
        assert sorted((tmp_path / name).read_bytes().splitlines()) == sorted(
            first[name].splitlines()
        )
    assert (tmp_path / "figure.svg").read_bytes() == first["figure.svg"]


def test_readme_has_the_tables_of_the_committed_results():
    readme = (FOLDER / "README.md").read_text()
    for part in summary.markdown(RESULTS).strip().split("\n\n"):
        assert part in readme


def test_what_holds_of_random_keys():
    rows = [row for row in table(RESULTS) if row["kind"] == "random"]
    errors = {
        fit: [row for row in rows if (row["fit"], row["quantity"]) == (fit, "error_integrated")]
        for fit in ("constant", "linear")
    }
    best = {fit: min(each, key=lambda row: float(row["value"])) for fit, each in errors.items()}
    assert all(row["seeds"] == "3" for row in rows)
    # The best local-linear fit is below the best local-constant one in every seed, and wider.
    assert float(best["linear"]["high"]) < float(best["constant"]["low"])
    assert float(best["linear"]["bandwidth"]) > float(best["constant"]["bandwidth"])
