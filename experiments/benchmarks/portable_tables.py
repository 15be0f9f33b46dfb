"""The tables of kernels/PORTABLE.md, from the results of portable.py and of the compiler.

python experiments/benchmarks/portable_tables.py          # writes them into the document
"""

from __future__ import annotations

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENT = ROOT / "kernels" / "PORTABLE.md"
MEASURED = pathlib.Path(__file__).parent / "measured"
COMPILED = pathlib.Path(__file__).parent / "compiled" / "portable.json"

_OURS, _HOPPER = "mosaic_gpu_portable", "mosaic_gpu"


def load(path: pathlib.Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def load_measured() -> dict:
    """The records of all runs on the H200, the first one's first."""
    runs = [load(path) for path in sorted(MEASURED.glob("portable_h200*.json"))]
    return {"records": [record for run in runs for record in run["records"]]}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed(document: dict) -> str:
    """Times of the operator beside those of others, in milliseconds."""
    times: dict[tuple, dict[str, float]] = {}
    for record in document["records"]:
        cell = record["cell"]
        if cell["kind"] == "speed":
            where = cell["head_dim"], cell["mechanism"], cell["ridge"], cell["which"]
            found = times.setdefault(where, {})
            found[cell["implementation"]] = record.get("time_median_s")
    rows = []
    for (head_dim, mechanism, ridge, which), found in sorted(times.items(), key=_order):
        ours, hopper = found.get(_OURS), found.get(_HOPPER)
        ratio = f"{ours / hopper:.2f}" if ours and hopper else "not run"
        name = mechanism if ridge is None else f"{mechanism}, ridge {ridge:g}"
        passes = "forward" if which == "forward" else "with gradients"
        xla = found.get("xla")
        ratio = [ratio, f"{xla / ours:.1f}" if ours and xla else ""]
        others = [_time(found[n]) if n in found else "" for n in (_OURS, _HOPPER, "cudnn", "xla")]
        rows.append([str(head_dim), name, passes, *others, *ratio])
    head = ["d", "mechanism", "pass", "portable", "Hopper's", "cuDNN", "XLA", "portable / Hopper's"]
    head.append("XLA / portable")
    keep = [i for i, name in enumerate(head) if any(row[i] for row in rows)]
    return table([head[i] for i in keep], [[row[i] for i in keep] for row in rows])


def _order(item):
    head_dim, mechanism, ridge, which = item[0]
    return head_dim, mechanism != "softmax", -(ridge or 0), which


def _time(seconds: float | None) -> str:
    return "not run" if seconds is None else f"{seconds * 1e3:.2f}"


def accuracy(document: dict) -> str:
    """Relative errors, and what has not been run."""
    rows = []
    for record in document["records"]:
        cell = record["cell"]
        if cell["kind"] != "accuracy":
            continue
        mechanism = cell["mechanism"] if cell["ridge"] is None else f"lla, ridge {cell['ridge']:g}"
        if cell["traced"]:
            mechanism += " (array)"
        sizes = f"{cell['queries']} × {cell['keys']}, d = {cell['head_dim']}"
        if cell["value_dim"] != cell["head_dim"]:
            sizes += f" (values {cell['value_dim']})"
        options = ", ".join(f"{name}" for name, _ in cell["options"]) or "causal"
        if cell["inputs"] != "normal":
            options += f", {cell['inputs']} inputs"
        if "errors" not in record:
            rows.append([mechanism, cell["dtype"], sizes, options, "not run", "", ""])
            continue
        errors = record["errors"]
        worst = max(errors, key=lambda name: errors[name] if name != "output" else 0)
        repeat = "equal" if record["repeatable"] else "different"
        rows.append(
            [mechanism, cell["dtype"], sizes, options, f"{errors['output']:.1e}",
             f"{errors[worst]:.1e} ({worst})", repeat]
        )  # fmt: skip
    head = ["mechanism", "dtype", "queries × keys", "case", "output", "worst gradient", "two runs"]
    return table(head, rows)


def variants(document: dict) -> str:
    """The fastest configuration of every kernel, and the spread over all of them."""
    found: dict[tuple, list[tuple[float, dict]]] = {}
    for record in document["records"]:
        cell = record["cell"]
        if cell["kind"] == "variant" and "time_median_s" in record:
            where = cell["head_dim"], cell["mechanism"]
            found.setdefault(where, []).append((record["time_median_s"], dict(cell["options"])))
    rows = []
    for (head_dim, kernel), measured in sorted(found.items()):
        measured.sort(key=lambda pair: pair[0])
        seconds, options = measured[0]
        where = "registers" if options["resident_operand"] else "shared memory"
        rows.append(
            [str(head_dim), kernel, str(options["block"]), str(options["stages"]), where,
             _time(seconds), _time(measured[-1][0])]
        )  # fmt: skip
    head = ["d", "kernel", "block", "stages", "operands in", "fastest", "slowest of 8"]
    return table(head, rows)


def compiled(document: dict) -> str:
    """Registers of a thread, bytes that it spills, and KiB of shared memory, by kernel and card."""
    kernels = document["kernels"]
    cards = sorted({name.split()[0] for name in kernels}, key=lambda c: [*map(int, c.split("."))])
    names = list(dict.fromkeys(name.split()[1] for name in kernels))
    names.sort(key=lambda name: (int(name.rsplit("_", 1)[1]), name))
    rows = []
    for name in names:
        row = [name]
        for card in cards:
            one = kernels.get(f"{card} {name}")
            numbers = (one["registers"], one["spills"], round(one["shared"] / 1024)) if one else ()
            row.append(", ".join(map(str, numbers)) or "–")
        rows.append(row)
    return table(["kernel", *(f"sm_{card.replace('.', '')}" for card in cards)], rows)


def render(text: str) -> str:
    """A document with all its tables written anew."""
    measured = load_measured()
    found = {name: make(measured) for name, make in
             (("speed", speed), ("accuracy", accuracy), ("variants", variants))}  # fmt: skip
    if COMPILED.exists():
        found["compiled"] = compiled(load(COMPILED))
    for name, rendered in found.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the document has no table {name!r}.")
        text = pattern.sub(lambda match: match[1] + "\n" + rendered + "\n\n" + match[2], text)  # noqa: B023
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
