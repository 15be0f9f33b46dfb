"""Error against solver iterations: the job end to end, and what its README says of the results."""

from lla.experiments.solver_iterations import summary
from tests.experiments.scripts import ROOT, run, table

FOLDER = ROOT / "experiments" / "solver_iterations"
CONFIG = ROOT / "configs" / "solver_iterations.py"
RESULTS = FOLDER / "results" / "full"
DRAWN = ("summary.csv", "figure.png", "figure.svg")


def test_smoke_and_resume(tmp_path):
    flags = (f"--config={CONFIG}:smoke", f"--workdir={tmp_path}", "--config.iterations=(2,)")
    done = run("experiments/run_study.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr and str(tmp_path / "figure.png") in done.stdout
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    first = {name: (tmp_path / name).read_bytes() for name in (*DRAWN, "metrics.jsonl")}
    rows = table(tmp_path)
    assert {row["solver"] for row in rows} == {"fixed", "adaptive", "softmax", "rounding"}
    error = {row["solver"]: float(row["error"]) for row in rows}
    assert error["adaptive"] < 2 * error["rounding"] < error["fixed"] < error["softmax"]

    # A killed run: half of the last record is missing. Rerunning computes it again.
    (tmp_path / "metrics.jsonl").write_bytes(first["metrics.jsonl"][:-99])
    again = run("experiments/run_study.py", *flags)
    assert again.returncode == 0, again.stderr
    assert "2 trials, 1 already finished" in again.stdout
    assert {name: (tmp_path / name).read_bytes() for name in first} == first


def test_readme_has_the_tables_of_the_committed_results():
    readme = (FOLDER / "README.md").read_text()
    for part in summary.markdown(summary.table(RESULTS)).strip().split("\n\n"):
        assert part in readme


def test_what_holds_and_what_does_not():
    rows = {
        (r["inputs"], int(r["dim"]), r["dtype"], float(r["ridge"]), r["solver"], r["iterations"]): r
        for r in table(RESULTS)
    }
    for (inputs, dim, dtype, ridge, solver, iterations), row in rows.items():
        rounding = float(rows[inputs, dim, dtype, ridge, "rounding", "0"]["error"])
        allowed = max(1e-5, 1e-5 / ridge) if dtype == "float32" else 2 * rounding
        error = float(row["error_max"])
        published = iterations == "32" and ridge >= 0.1 and (dtype == "bfloat16" or dim == 64)
        if published or solver == "adaptive":
            assert error < allowed
        elif iterations == "32" and ridge == 0.01 and inputs != "clustered":
            assert float(row["error_min"]) > 0.03
        elif iterations == "1" and ridge <= 1:
            softmax = float(rows[inputs, dim, dtype, ridge, "softmax", "0"]["error"])
            assert float(row["error"]) > softmax
