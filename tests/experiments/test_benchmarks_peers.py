"""The comparison with other libraries: adapters, exact results, isolation, records, the table."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla
from lla.experiments.benchmarks import hopper, peers, peers_adapters, results, truth

SMALL = [
    "--implementation=xla", "--batch=1", "--heads=2", "--length=16", "--head_dims=8",
    "--ridges=1", "--repeats=2", "--budget=0.1", "--workers=2",
]  # fmt: skip
CASE = (1, 2, 16, 8, "bfloat16")


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises


@pytest.fixture(scope="module")
def inputs():
    """float64 [heads, T, H] of two heads."""
    rng = np.random.default_rng(0)
    names = ("query", "key", "value", "probe", "cotangent")
    return {name: rng.standard_normal((2, 16, 8)) for name in names}


@pytest.fixture
def arrays(inputs):
    return {
        name: jnp.asarray(array.swapaxes(0, 1)[None], jnp.bfloat16)
        for name, array in inputs.items()
    }


def test_adapters_say_why_they_cannot_run(without_torch, tmp_path):
    found = {}
    for argv in ([], [f"--flash_lla={tmp_path}"]):
        for adapter in peers.make_adapters(peers.parse(argv), {}):
            found[adapter.name, adapter.mechanism, bool(argv)] = adapter.available()
    expected = {
        "mosaic_gpu": "needs a GPU", "cudnn": "needs a GPU", "torch_flash": "torch",
        "torch_cudnn": "torch", "fla": "torch", "flash_lla": "no --flash_lla folder",
    }  # fmt: skip
    for (name, _, given), reason in found.items():
        wanted = "torch" if given and name == "flash_lla" else expected[name]
        assert wanted in reason
    assert {name for name, _, _ in found} == set(expected)
    with pytest.raises(SystemExit, match="flash"):
        peers.make_adapters(peers.parse(["--only", "flash"]), {})


def test_layouts_are_inverted():
    sizes = peers_adapters.Sizes(2, 3, 5, 4, "bfloat16")
    array = np.arange(2 * 3 * 5 * 4).reshape(2, 5, 3, 4)
    shapes = {"fla": (2, 5, 3, 4), "torch_flash": (2, 3, 5, 4), "flash_lla": (6, 5, 4)}
    for adapter in peers.make_adapters(peers.parse([]), {}):
        if adapter.name in shapes:
            there = adapter.to_layout(array)
            assert there.shape == shapes[adapter.name]
            np.testing.assert_array_equal(adapter.from_layout(there, sizes), array)
            if adapter.name == "flash_lla":
                np.testing.assert_array_equal(there[4], array[1, :, 1])


def test_checked_heads():
    sizes = peers_adapters.Sizes(2, 16, 16, 8, "bfloat16")
    assert peers.checked_heads(sizes, 2) == [(0, 0), (1, 15)]
    few = peers_adapters.Sizes(1, 2, 16, 8, "bfloat16")
    assert peers.checked_heads(few, 8) == [(0, 0), (0, 1)]
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    picked = peers_adapters.pick(array, [(0, 0), (1, 3)])
    np.testing.assert_array_equal(picked, np.stack([array[0, :, 0], array[1, :, 3]]))


def parallax(query, key, value, probe):
    """One row at a time, from the definition."""
    out = []
    for i in range(len(query)):
        keys, values = key[: i + 1], value[: i + 1]
        weights = np.exp(keys @ query[i] / np.sqrt(query.shape[-1]))
        weights /= weights.sum()
        out.append((weights * (1 - (keys - weights @ keys) @ probe[i])) @ values)
    return np.array(out)


def mesanet(query, key, value, probe):
    del probe
    query, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    out = []
    for i in range(len(query)):
        system = key[: i + 1].T @ key[: i + 1] + np.eye(query.shape[-1])
        out.append(value[: i + 1].T @ (key[: i + 1] @ np.linalg.solve(system, query[i])))
    return np.array(out)


@pytest.mark.parametrize("definition", [parallax, mesanet])
def test_exact_results(inputs, definition):
    """Outputs by the definition, gradients by central differences along one direction."""
    exact, _ = peers.exact(definition.__name__, None, inputs)
    names = ("query", "key", "value", "probe")

    def outputs(given):
        return np.stack([definition(*(given[name][h] for name in names)) for h in range(2)])

    np.testing.assert_allclose(exact["output"], outputs(inputs), rtol=1e-10, atol=1e-12)
    for name in names:
        if name in exact:
            direction = np.random.default_rng(1).standard_normal(inputs[name].shape)
            ends = [outputs({**inputs, name: inputs[name] + s * direction}) for s in (1e-5, -1e-5)]
            slope = np.vdot(inputs["cotangent"], ends[0] - ends[1]) / 2e-5
            np.testing.assert_allclose(np.vdot(exact[name], direction), slope, rtol=1e-6)
    assert ("probe" in exact) == (definition is parallax)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("peers") / "peers_cpu.json"
    argv = [*SMALL, "--mechanisms", "softmax", "lla", f"--out={path}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        return peers.main(argv), argv, path


def test_run(measured, without_torch, monkeypatch, capsys):
    status, argv, path = measured
    document = results.load(path)
    assert status == 0 and document["header"]["benchmark"] == "peers"
    ours = [r for r in document["records"] if r["implementation"] == "xla"]
    others = [r for r in document["records"] if r["implementation"] != "xla"]
    found = {(r["mechanism"], r["ridge"], r["pass"]) for r in ours}
    passes = truth.PASSES
    assert found == {(m, r, p) for m, r in (("softmax", None), ("lla", 1)) for p in passes}
    for record in ours:
        assert record["status"] == "timed" and record["repeats"] == 2
        names = {"output"} | ({"query", "key", "value"} if "back" in record["pass"] else set())
        assert set(record["errors"]) == names and record["checked_heads"] == 2
        assert all(1e-4 < e <= record["bounds"][n] for n, e in record["errors"].items())
        assert ("mean_iterations" in record) == (record["mechanism"] == "lla")
    assert len(others) == 2 * 4 and all(r["status"] == "unavailable" for r in others)
    # What is finished is kept, what was unavailable is tried again and replaced.
    monkeypatch.setattr(hopper, "compile_program", None)
    assert peers.main(argv) == 0
    assert len(results.load(path)["records"]) == len(document["records"])
    assert "| xla, lla, ridge 1 | " in capsys.readouterr().out


def make_fake(name, act, when=0):
    """An adapter of softmax attention that calls `act(results)` from its call `when` on."""

    class Fake(peers_adapters.Adapter):
        mechanism, calls = "softmax", 0

        def available(self):
            return None

        def prepare(self, case, ridge, arrays):
            return arrays

        def forward(self, given):
            self.calls += 1
            inputs = [given[name] for name in ("query", "key", "value")]
            out = lla.softmax_attention(*inputs, implementation="xla")
            return act({"output": out}) if self.calls > when else {"output": out}

        def forward_backward(self, given):
            raise ValueError("no gradients")

        def wait(self, results):
            jax.block_until_ready(results)

        def collect(self, results, case, heads):
            pick = peers_adapters.pick
            return {name: pick(np.asarray(array), heads) for name, array in results.items()}

    fake = Fake()
    fake.name = name
    return fake


def broken(results):
    raise RuntimeError("out of order\nand more")


def test_one_adapter_does_not_stop_another(arrays):
    fakes = [
        make_fake("right", lambda results: results),
        make_fake("broken", broken),
        make_fake("breaks later", broken, when=1),
        make_fake("wrong", lambda results: {"output": 1.25 * results["output"]}),
        make_fake("not finite", lambda results: {"output": jnp.nan * results["output"]}),
    ]
    sizes = peers_adapters.Sizes(*CASE)
    todo = [(fake, None) for fake in reversed(fakes)]
    options = peers.parse(SMALL)
    checked = peers.check_group(options, sizes, todo, arrays)
    records = peers.time_group(options, *checked)
    found = {r["implementation"]: r for r in records if r["pass"] == "forward"}
    for record in records:
        results.check_record({**record, "commit": "abc", "date": "2000-01-01"})
        if record["pass"] != "forward":
            assert record["reason"] == "ValueError: no gradients"
    assert found["right"]["status"] == "timed" and found["right"]["errors"]["output"] < 1e-2
    for name in ("broken", "breaks later"):
        assert found[name]["status"] == "unavailable"
        assert found[name]["reason"] == "RuntimeError: out of order"
    assert found["wrong"]["status"] == "refused" and "time_median_s" not in found["wrong"]
    np.testing.assert_allclose(found["wrong"]["errors"]["output"], 0.25, rtol=1e-2)
    assert found["not finite"]["status"] == "refused"
    assert found["not finite"]["errors"] == {"output": None}


def made_up(implementation, mechanism, ridge, which, seconds, error, bound):
    names = ("output",) if which == "forward" else ("output", "query", "key", "value")
    record = {
        "implementation": implementation, "mechanism": mechanism, "ridge": ridge, "pass": which,
        "batch": 2, "heads": 16, "n": 4096, "head_dim": 64, "commit": "abc", "date": "2000-01-01",
        "errors": dict.fromkeys(names, error), "worst_row": None if error is None else 9 * error,
        "bounds": dict.fromkeys(names, bound), "truth": "made up", "status": "refused",
        "reason": f"error too large: {error}",
    }  # fmt: skip
    if error is not None and error <= bound:
        times = {"time_min_s": seconds, "time_median_s": 1.5 * seconds, "repeats": 7}
        del record["reason"]
        record |= {"status": "timed", **times}
    return record


def test_table():
    records = []
    for i, which in enumerate(truth.PASSES, 1):
        records += [
            made_up("flash_lla", "lla", 0.01, which, 9e-3 * i, 3.4, 0.1),
            made_up("flash_lla", "lla", 10.0, which, 9e-3 * i, 3e-3, 0.1),
            made_up("flash_lla", "lla", 1.0, which, 9e-3 * i, None, 0.1),
            made_up("mosaic_gpu", "lla", 10.0, which, 9e-4 * i, 2e-3, 4e-3),
            made_up("cudnn", "softmax", None, which, 2e-4 * i, 2e-3, 1e-2),
        ]
    gone = {**records[-1], "implementation": "fla", "mechanism": "mesanet", "status": "unavailable"}
    gone["reason"] = "ModuleNotFoundError: No module named 'fla'"
    for name in ("errors", "bounds", "worst_row", "truth", "time_min_s", "time_median_s"):
        del gone[name]
    records.append(gone)
    lines = peers.result_tables(records).splitlines()
    assert lines[0].startswith("**Head dimension 64**, batch 2, 16 heads, n = 4096")
    rows = [line for line in lines if line.startswith("| ")]
    assert [row.split(" | ")[0][2:] for row in rows] == [
        "call", "cuDNN through JAX, softmax", "mosaic_gpu, lla, ridge 10",
        "FlashLLA, lla, ridge 10", "FlashLLA, lla, ridge 1", "FlashLLA, lla, ridge 0.01",
        "flash-linear-attention, mesanet",
    ]  # fmt: skip
    times, errors = "1.35 (0.9) | 4.50 | 2.7 (1.8) | 4.50", "2.0e-03 | 1.8e-02"
    gradients = " | 2.0e-03 | 2.0e-03 | 2.0e-03 |  |"
    assert rows[2] == f"| mosaic_gpu, lla, ridge 10 | {times} | {errors}{gradients}"
    # The error of what is refused is shown, and no time.
    assert "| refused |  | refused |  | 3.4e+00 | 3.1e+01 | 3.4e+00 |" in rows[5]
    assert "| refused |  | refused |  | not finite | not finite |" in rows[4]
    assert "| unavailable |" in rows[6]
    assert lines[-1].endswith("unavailable: ModuleNotFoundError: No module named 'fla'")
    header = results.make_header("peers", {})
    text = peers.markdown({"header": header, "records": records})
    assert text.startswith("Measured on") and lines[0] in text
