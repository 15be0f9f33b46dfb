"""The benchmark of the portable kernels: its cells, its workers, and its portable_tables."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lla.experiments.benchmarks import portable, portable_tables

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "benchmarks"


def test_tables_are_those_of_the_results():
    text = portable_tables.DOCUMENT.read_text(encoding="utf-8")
    assert portable_tables.render(text) == text


def test_a_table_that_the_document_lacks_is_an_error():
    with pytest.raises(ValueError, match="no table"):
        portable_tables.render("# Nothing\n")


def test_results_name_the_card_and_every_error_is_below_its_bound():
    for path in portable_tables.MEASURED.glob("portable_h200*.json"):
        header = portable_tables.load(path)["header"]
        assert {"device", "commit", "jax", "date"} <= header.keys()
    records = portable_tables.load_measured()["records"]
    cells = [json.dumps(record["cell"]) for record in records]
    assert len(set(cells)) == len(cells)
    right = [r for r in records if "errors" in r]
    assert right
    for record in right:
        assert record["errors"]["output"] <= record["bound"]
        assert max(record["errors"].values()) <= 10 * record["bound"]
        assert record["repeatable"]


def test_a_worker_that_cannot_serve_a_cell_goes_on(tmp_path):
    """Here there is no GPU: every cell fails, each with its reason."""
    output = tmp_path / "out.json"
    command = [
        sys.executable, str(FOLDER / "portable.py"), "--workers", "1", "--kinds", "speed",
        "--head_dims", "64", "--limit", "25", "--output", str(output), "--device", "none",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text())
    assert document["header"]["device"] == "none"
    ours = [r for r in document["records"] if r["cell"]["implementation"] != "xla"]
    assert ours and all(r["status"] == "failed" for r in ours)
    assert any("NVIDIA" in r["reason"] for r in ours)


def test_a_worker_that_dies_is_replaced(tmp_path, monkeypatch):
    """The cell that kills it is lost, the next one is not."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys\n"
        "for line in sys.stdin:\n"
        "    if json.loads(line)['mechanism'] == 'parallax':\n"
        "        os._exit(3)\n"
        "    print('result ' + json.dumps({'status': 'right'}), flush=True)\n"
    )
    monkeypatch.setattr(portable, "__file__", str(script))
    mechanisms = ("softmax", "parallax", "lla", "parallax", "softmax")
    cells = [portable.Cell("accuracy", mechanism) for mechanism in mechanisms]
    board = portable.Board(cells, tmp_path / "out.json", {})
    portable.serve(board, "lock", 30.0, portable.time.monotonic() + 60)
    found = [(r["cell"]["mechanism"], r["status"]) for r in board.records]
    assert found == [(m, "failed" if m == "parallax" else "right") for m in mechanisms]


def test_cells_survive_the_way_to_a_worker():
    options = portable.argparse.Namespace(
        head_dims=[64, 128], variants=True, only="", kinds=("accuracy", "speed", "variant")
    )
    cells = portable.make_cells(options)
    assert len(set(cells)) > 100
    for cell in cells:
        fields = json.loads(json.dumps(dataclasses.asdict(cell)))
        assert portable.read_cell(fields) == cell
