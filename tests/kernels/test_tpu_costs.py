"""The tables in kernels/TPU.md match the committed costs, and these match the kernels."""

import json

import pytest

from lla.experiments.benchmarks import tpu_costs


@pytest.fixture(scope="module")
def document():
    return json.loads(tpu_costs.RESULT.read_text(encoding="utf-8"))


def test_tables_are_those_of_the_result(document):
    text = tpu_costs.DOCUMENT.read_text(encoding="utf-8")
    assert tpu_costs.render(text, document) == text
    for chip in (*tpu_costs.CHIPS, "Estimates, not measurements", "Nothing was run on a TPU"):
        assert chip in text
    with pytest.raises(ValueError, match="generated blocks"):
        tpu_costs.render("no block", document)


@pytest.mark.parametrize("mechanism", ["softmax", "parallax"])
def test_counts_are_those_of_the_kernels(document, mechanism):
    check(document, mechanism, 128, None)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", tpu_costs.HEAD_DIMS)
@pytest.mark.parametrize("ridge", tpu_costs.RIDGES)
def test_counts_are_those_of_the_solving_kernels(document, head_dim, ridge):
    check(document, "lla", head_dim, ridge)


def check(document, mechanism, head_dim, ridge):
    key = {"mechanism": mechanism, "ridge": ridge, "head_dim": head_dim}
    (case,) = (c for c in document["cases"] if key.items() <= c.items())
    sizes = {name: document["sizes"][name] for name in ("batch", "heads", "length")}
    assert tpu_costs.count(mechanism, head_dim, ridge, **sizes) == case["passes"]


def test_products_in_one_part_are_the_units_of_the_derivation(document):
    """Where nothing is padded or split. Softmax attention also sums the mean key."""
    for case in document["cases"]:
        if case["head_dim"] != 128 or (case["mechanism"] == "lla" and case["ridge"] is None):
            continue
        for record in case["passes"]:
            extra = (case["mechanism"], record["pass"]) == ("softmax", "query gradient")
            assert record["products"] == record["units"] + extra, record


def test_a_large_ridge_takes_fewer_products(document):
    def products(ridge):
        key = {"mechanism": "lla", "ridge": ridge, "head_dim": 128}
        (case,) = (c for c in document["cases"] if key.items() <= c.items())
        return [record["products"] for record in case["passes"]]

    assert all(a < b for a, b in zip(products(10.0), products(None), strict=True))


def test_every_program_fits_into_vector_memory(document):
    """Into the 16 MiB that a kernel may use by default."""
    for case in document["cases"]:
        for compiled in case["compiled"].values():
            assert max(compiled["vmem_bytes"].values()) < 16 * 2**20


def test_visited_tiles():
    # Rows of 256 see 1, 1, 2, 2, ... tiles of 512 keys.
    assert tpu_costs.visited_tiles(2048, 256, 512) == 2 * (1 + 2 + 3 + 4)
    assert tpu_costs.visited_tiles(300, 128, 128) == 1 + 2 + 3


def test_estimate_takes_the_slower_of_products_and_copies():
    _, flops, bandwidth = tpu_costs.CHIPS["v5e"]
    one = {"kernel": "a", "flops": flops, "bytes": 2 * bandwidth, "iterated": True}
    other = {"kernel": "b", "flops": 3 * flops, "bytes": bandwidth, "iterated": False}
    assert tpu_costs.seconds([one, other], "v5e", ["a", "b"], 2.5) == pytest.approx(2 * 2.5 + 3)
    assert tpu_costs.seconds([one, other], "v5e", ["b"], 2.5) == pytest.approx(3)
