"""The cost of the TPU kernels, from programs that are compiled and never run.

    pip install "jax[tpu]"
    python experiments/benchmarks/tpu_costs.py --commit HASH   # compiled/tpu_costs.json
    python experiments/benchmarks/tpu_costs.py --tables        # the tables in kernels/TPU.md

Products are counted in the kernels as they were traced, vector memory and temporary memory are what
the compiler reports, times are estimates from data sheets. Needs no TPU; the compiler is in the
package libtpu.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from lla.runs import blocks, tables

FOLDER = pathlib.Path(__file__).resolve().parent
RESULT = FOLDER / "compiled" / "tpu_costs.json"
DOCUMENT = FOLDER.parents[1] / "kernels" / "TPU.md"

CHIPS = {
    # topology to compile for; bfloat16 operations and bytes of HBM a second, by the data sheets
    # https://docs.cloud.google.com/tpu/docs/v5e and .../v6e.
    "v5e": ("v5e:2x2", 197e12, 819e9),
    "v6e": ("v6e:2x2", 918e12, 1638e9),
}
MORE_CHIPS = {"v4": "v4:2x2x1", "v5p": "v5p:2x2x1"}  # compiled for, without estimates
PASSES = {
    # products (units of the derivation) of each pass of a kernel, in order
    ("lla", "lla_forward"): {"statistics": 2, "iteration": 3, "output": 3},
    ("lla", "lla_row_gradients"): {"right-hand side": 3, "iteration": 3, "query gradient": 5},
    ("lla", "lla_key_gradients"): {"key gradients": 8},
    ("parallax", "lla_forward"): {"statistics": 2, "output": 3},
    ("parallax", "lla_row_gradients"): {"right-hand side": 3, "query gradient": 4},
    ("parallax", "lla_key_gradients"): {"key gradients": 6},
    ("softmax", "lla_forward"): {"output": 2},
    ("softmax", "lla_row_gradients"): {"query gradient": 3},
    ("softmax", "lla_key_gradients"): {"key gradients": 4},
}
MECHANISMS = ("lla", "parallax", "softmax")
RIDGES = (10.0, None)  # known to be large; an array
HEAD_DIMS = (64, 128)
BATCH, HEADS, LENGTH = 2, 16, 4096
LONG = {"batch": 1, "heads": 2, "length": 65536}
ITERATION_LENGTH = 2048


# ---------------------------------------------------------------------------------------------
# Programs


def program(mechanism: str, head_dim: int, ridge, *, batch, heads, length, sharding=None):
    """Forward and backward pass of a causal call in bfloat16, and its abstract arguments."""
    import jax
    import jax.numpy as jnp

    from lla.ops.mosaic_tpu.backend import attend_shielded
    from lla.ops.problem import make_problem

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    size = (batch, length, heads, head_dim)
    arrays = {name: struct(*size) for name in ("query", "key", "value")}
    options = {}
    if mechanism == "parallax":
        arrays["probe"] = struct(*size)
    if mechanism == "lla" and ridge is None:
        arrays["ridge"] = struct(*size[:-1], dtype=jnp.float32)
    elif mechanism == "lla":
        options["ridge"] = ridge

    def run(arrays, cotangent):
        def forward(arrays):
            problem = make_problem(mechanism, **arrays, **options)
            return problem.restore(attend_shielded(problem)[0])

        out, pullback = jax.vjp(forward, arrays)
        return out, pullback(cotangent)

    return run, (arrays, struct(*size))


def compile_for(topology: str, *arguments, **sizes) -> dict[str, Any]:
    """Bytes of vector memory by kernel and of temporary HBM, and seconds to compile."""
    import jax
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    mesh = jax.sharding.Mesh(devices[:1], ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P())
    function, structs = program(*arguments, **sizes, sharding=sharding)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = jax.jit(function).trace(*structs)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    return {
        "vmem_bytes": vector_memory(compiled.as_text()),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_s": round(time.perf_counter() - start, 1),
    }


def vector_memory(text: str) -> dict[str, int]:
    """Bytes of vector memory of every kernel, from the text of a compiled program."""
    found = {}
    for line in text.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            name = re.search(r"lla_(forward|row_gradients|key_gradients)", line)[0]
            size = re.search(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"', line)
            found[name] = int(size[1])
    return found


# ---------------------------------------------------------------------------------------------
# Counts


def kernels_of(jaxpr) -> Iterator[Any]:
    """The `pallas_call` equations of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for inner in _jaxprs(equation):
                yield from kernels_of(inner)


def pipelines_of(jaxpr, depth: int = 0) -> Iterator[tuple[int, int]]:
    """For each loop with products, the floating-point operations of a step, and the loop's depth.

    The pipelines over tiles are loops of depth 1, those inside of the solver's loop of depth 2.
    """
    for equation in jaxpr.eqns:
        deeper = depth + (equation.primitive.name in ("while", "scan"))
        for inner in _jaxprs(equation):
            if deeper > depth and (flops := _product_flops(inner)):
                yield flops, deeper
            yield from pipelines_of(inner, deeper)


def _product_flops(jaxpr) -> int:
    """Operations of the products that no inner loop repeats."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name not in ("while", "scan"):
            total += sum(map(_product_flops, _jaxprs(equation)))
    return total


def _jaxprs(equation) -> Iterator[Any]:
    for parameter in equation.params.values():
        for item in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def visited_tiles(length: int, rows: int, keys: int) -> int:
    """The number of tiles of a causal head with a visible pair."""
    return sum(-(-min(length, first + rows) // keys) for first in range(0, length, rows))


def count(
    mechanism: str, head_dim: int, ridge, *, batch: int, heads: int, length: int
) -> list[dict]:
    """A record for each pass: products per pair of query and key, and bytes through HBM.

    `products` are in units of the derivation: products with vectors of length `head_dim`. Parts and
    the padding of the head dimension to 128 make them more than there.
    """
    import jax

    from lla.kernels.mosaic_tpu import configs

    sizes = {"batch": batch, "heads": heads, "length": length}
    function, structs = program(mechanism, head_dim, ridge, **sizes)
    blocks = configs.choose(length, length)
    padded = configs.round_up(head_dim, 128)
    records = []
    for kernel in kernels_of(jax.make_jaxpr(function)(*structs).jaxpr):
        name = kernel.params["name"]
        own_keys = name == "lla_key_gradients"
        keys = blocks.own_keys if own_keys else blocks.keys
        found = list(pipelines_of(kernel.params["jaxpr"]))
        names = PASSES[mechanism, name]
        assert len(found) == len(names), (mechanism, name, found)
        tiles = batch * heads * visited_tiles(length, blocks.rows, keys)
        for (which, units), (flops, depth) in zip(names.items(), found, strict=True):
            if own_keys:  # query, cotangent, the directions (float32 where solved), row numbers
                solved = {"lla": 2 * 4, "parallax": 2, "softmax": 0}[mechanism]
                moved = blocks.rows * (padded * (2 + 2 + solved) + 8 * 4)
            else:
                keys_alone = which in ("statistics", "iteration")
                moved = keys * padded * 2 * (1 if keys_alone else 2)
            records.append({
                "kernel": name, "pass": which, "iterated": depth == 2,
                "units": units, "products": flops / (2 * head_dim * blocks.rows * keys),
                "flops": flops * tiles, "bytes": moved * tiles,
                "visible_share": batch * heads * length * (length + 1) / 2
                / (tiles * blocks.rows * keys),
            })  # fmt: skip
    return records


def iterations(head_dim: int, ridge: float) -> float:
    """Iterations of a tile on standard normal inputs, weighted by the keys that it sees.

    Those of the implementation in XLA, which stops by the same rule; a tile has the most of its
    rows.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import lla
    from lla.kernels.mosaic_tpu import configs

    rng = np.random.default_rng(0)
    shape = (ITERATION_LENGTH, 1, head_dim)
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(3)]
    _, stats = jax.jit(
        lambda *a: lla.local_linear_attention(
            *a, ridge=ridge, solver=lla.Solver(method="cg"), implementation="xla",
            return_stats=True,
        )
    )(*arrays)  # fmt: skip
    rows = configs.choose(ITERATION_LENGTH, ITERATION_LENGTH).rows
    by_tile = np.asarray(stats.iterations).reshape(-1, rows).max(1)
    return float(np.average(by_tile, weights=1 + np.arange(by_tile.size)))


def seconds(records, chip: str, kernels, iterated: float) -> float:
    """An estimate: each pass at the peak rate of products or of HBM, whichever takes longer."""
    _, flops, bandwidth = CHIPS[chip]
    return sum(
        max(r["flops"] / flops, r["bytes"] / bandwidth) * (iterated if r["iterated"] else 1)
        for r in records
        if r["kernel"] in kernels
    )


# ---------------------------------------------------------------------------------------------
# Result and tables


def make_document(commit: str | None) -> dict[str, Any]:
    cases = []
    for mechanism in MECHANISMS:
        for ridge in RIDGES if mechanism == "lla" else (None,):
            for head_dim in HEAD_DIMS:
                arguments = (mechanism, head_dim, ridge)
                case = {"mechanism": mechanism, "ridge": ridge, "head_dim": head_dim}
                sizes = {"batch": BATCH, "heads": HEADS, "length": LENGTH}
                case["passes"] = count(*arguments, **sizes)
                topologies = {n: c[0] for n, c in CHIPS.items()} | MORE_CHIPS
                case["compiled"] = {
                    n: compile_for(t, *arguments, **sizes) for n, t in topologies.items()
                }
                if head_dim == 128:
                    case["long"] = {n: compile_for(CHIPS[n][0], *arguments, **LONG) for n in CHIPS}
                cases.append(case)
                print(mechanism, ridge, head_dim, case["compiled"], flush=True)
    names = ("jax", "jaxlib", "libtpu")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "versions": {name: importlib.metadata.version(name) for name in names},
        "sizes": {"batch": BATCH, "heads": HEADS, "length": LENGTH, "long": LONG},
        "iterations": {
            str(d): {f"{r:g}": iterations(d, r) for r in (10.0, 1.0, 0.1)} for d in HEAD_DIMS
        },
        "cases": cases,
    }


def _label(case: Mapping) -> str:
    ridge = {None: ", ridge an array", 10.0: ", ridge 10"}[case["ridge"]]
    return case["mechanism"] + (ridge if case["mechanism"] == "lla" else "")


def markdown(document: Mapping) -> str:
    versions = ", ".join(f"{n} {v}" for n, v in document["versions"].items())
    sizes = document["sizes"]
    text = [
        f"From programs compiled with {versions} on {document['date'][:10]}, commit "
        f"{(document['commit'] or 'unknown')[:10]}: bfloat16, causal, batch {sizes['batch']}, "
        f"{sizes['heads']} heads, n = {sizes['length']}, forward and backward pass. "
        "Nothing was run on a TPU."
    ]
    names = list(dict.fromkeys(
        (p["kernel"], p["pass"]) for case in document["cases"] for p in case["passes"]
    ))  # fmt: skip
    rows = []
    for kernel, which in names:
        row = [kernel.removeprefix("lla_").replace("_", " "), which]
        for case in document["cases"]:
            found = [p for p in case["passes"] if (p["kernel"], p["pass"]) == (kernel, which)]
            row.append(f"{found[0]['products']:g} ({found[0]['units']})" if found else "")
        rows.append(row)
    heads = [f"{_label(c)}, d = {c['head_dim']}" for c in document["cases"]]
    text.append(
        "Products of a pair of query and key with vectors of length d, and in brackets the count "
        "of the derivation. Two parts of a number, and d = 64 in registers of 128 lanes, make "
        "more.\n\n" + tables.markdown(["kernel", "pass", *heads], rows)
    )
    text.append(_memory(document))
    text.append(_times(document))
    return "\n\n".join(text)


def _memory(document: Mapping) -> str:
    chips = list(document["cases"][0]["compiled"])
    rows = []
    for case in document["cases"]:
        for kernel in case["compiled"][chips[0]]["vmem_bytes"]:
            row = [_label(case), case["head_dim"], kernel.removeprefix("lla_").replace("_", " ")]
            for chip in chips:
                row.append(f"{case['compiled'][chip]['vmem_bytes'][kernel] / 2**20:.1f}")
            rows.append(row)
    long = document["sizes"]["long"]
    temporary = [
        [_label(case), *(f"{case['long'][n]['temp_bytes'] / 2**20:.0f}" for n in CHIPS)]
        for case in document["cases"]
        if "long" in case
    ]
    return (
        "Vector memory that a kernel takes, MiB, as the compiler reports it.\n\n"
        + tables.markdown(["mechanism", "d", "kernel", *chips], rows)
        + f"\n\nTemporary HBM of n = {long['length']}, batch {long['batch']}, {long['heads']} "
        "heads, d = 128, forward and backward pass, MiB.\n\n"
        + tables.markdown(["mechanism", *CHIPS], temporary)
    )


def _times(document: Mapping) -> str:
    rows = []
    for case in document["cases"]:
        found = document["iterations"][str(case["head_dim"])]
        if case["mechanism"] != "lla":
            found = {"": 0.0}
        elif case["ridge"] is not None:
            found = {f"{case['ridge']:g}": found[f"{case['ridge']:g}"]}
        for ridge, iterated in found.items():
            row = [
                case["mechanism"], ridge, case["head_dim"],
                ("one" if case["ridge"] else "two") if ridge else "",
                f"{iterated:.1f}" if ridge else "",
            ]  # fmt: skip
            everything = [k for m, k in PASSES if m == case["mechanism"]]
            for chip in CHIPS:
                both = (
                    seconds(case["passes"], chip, kernels, iterated)
                    for kernels in (["lla_forward"], everything)
                )
                row.append("; ".join(f"{1e3 * s:.2f}" for s in both))
            rows.append(row)
    rates = ", ".join(
        f"{name} {flops / 1e12:.0f} TFLOP/s and {bandwidth / 1e9:.0f} GB/s"
        for name, (_, flops, bandwidth) in CHIPS.items()
    )
    return (
        "**Estimates, not measurements**: milliseconds of the forward pass; of forward and "
        "backward pass, if every pass ran at the peak rate of products or of HBM in the data sheet "
        f"({rates}). "
        "Exponentials, masks and the start of each pipeline are left out, so that real times will "
        "be longer. Iterations are those of a tile on standard normal inputs at n = "
        f"{ITERATION_LENGTH}, taken from the implementation in XLA, which stops by the same rule; "
        "the adjoint solve is given as many.\n\n"
        + tables.markdown(["mechanism", "ridge", "d", "parts", "iterations", *CHIPS], rows)
    )


def render(text: str, document: Mapping) -> str:
    """`text` with the tables of `document` in its generated block."""
    return blocks.renew(text, lambda _: f"\n{markdown(document)}\n\n", ["tpu_costs"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", help="recorded in the result")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    parser.add_argument("--output", type=pathlib.Path, default=RESULT)
    options = parser.parse_args(argv)
    if not options.tables:
        # libtpu reads these when it starts; without them it looks for a cloud machine.
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
        options.output.parent.mkdir(exist_ok=True)
        text = json.dumps(make_document(options.commit), indent=1)
        options.output.write_text(text + "\n", encoding="utf-8")
    document = json.loads(options.output.read_text(encoding="utf-8"))
    DOCUMENT.write_text(render(DOCUMENT.read_text(encoding="utf-8"), document), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
