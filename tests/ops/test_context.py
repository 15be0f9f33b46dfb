"""One sequence over several devices: results, gradients, and what is sent."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lla
import lla.sharding
from tests.measure import latin
from tests.ops.cases import Shape, make_inputs
from tests.ops.harness import FUNCTIONS, relative_error

if jax.device_count() < 8:
    pytest.skip("needs 8 devices", allow_module_level=True)

FLOATS = {
    "lla": ("query", "key", "value", "ridge", "scale"),
    "parallax": ("query", "key", "value", "probe", "scale"),
    "softmax": ("query", "key", "value", "scale"),
}
SIZES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}


@functools.cache
def mesh_of(parts: int, kind: AxisType):
    devices = jax.devices()[: 2 * parts if parts < 8 else 8]
    shape = (2, parts) if parts < 8 else (1, 8)
    return jax.make_mesh(shape, ("data", "context"), axis_types=(kind,) * 2, devices=devices)


def collectives(text: str) -> dict[str, list[int]]:
    """By kind of collective, the bytes of every result."""
    found = {}
    pattern = r" = (\w+)\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter|collective-permute)\("
    for kind, shape, name in re.findall(pattern, text):
        count = np.prod([int(n) for n in shape.split(",") if n], dtype=int)
        found.setdefault(name, []).append(int(count) * SIZES[kind])
    tuples = re.findall(r" = \((.*?)\) (all-gather|all-reduce|reduce-scatter|all-to-all)\(", text)
    for shapes, name in tuples:
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            count = np.prod([int(n) for n in shape.split(",") if n], dtype=int)
            found.setdefault(name, []).append(int(count) * SIZES[kind])
    return found


def arrays_of(shape: Shape, mechanism: str, seed=0):
    arrays = {n: jnp.asarray(a, jnp.float32) for n, a in make_inputs(shape, seed=seed).items()}
    return {name: arrays[name] for name in FLOATS[mechanism]}, arrays["cotangent"]


def result_and_gradients(function, operands, cotangent, extra):
    out, pullback = jax.vjp(lambda operands: function(operands, extra), operands)
    return out, pullback(cotangent)[0]


def run(style, parts, balanced, mechanism, operands, cotangent, extra=None, static=None):
    """Output and gradients in the order of the sequence, and the compiled text."""
    extra, static = extra or {}, static or {}
    kind = AxisType.Explicit if style == "explicit" else AxisType.Auto
    mesh = mesh_of(parts, kind)
    by_token = {"segment_ids"} | set(operands)
    rows = P("data", "context")

    def order(tree, back=False):
        if not balanced:
            return tree
        change = lla.sharding.unbalance if back else lla.sharding.balance
        return jax.tree.map(lambda a: change(a, parts), tree)

    extra = {n: order(a) if n in by_token else a for n, a in extra.items()}
    if "mask" in extra and balanced and extra["mask"].shape[2] > 1:
        extra["mask"] = lla.sharding.balance(extra["mask"], parts, axis=2)
    places = {n: jax.tree.map(lambda a: rows, a) for n, a in extra.items()}
    for name in ("query_offset", "key_value_seq_lengths"):
        if name in extra:
            places[name] = P("data") if extra[name].ndim else P()
    if "mask" in extra:
        places["mask"] = P("data" if extra["mask"].shape[0] > 1 else None, None, "context")
    options = dict(context_axis="context", context_balance=balanced)

    def function(operands, extra):
        return FUNCTIONS[mechanism](**operands, **extra, **static, **options)

    if style == "shard_map":
        function = jax.shard_map(
            function, mesh=mesh, in_specs=({n: rows for n in operands}, places), out_specs=rows
        )
    if style == "on_mesh":
        attend = lla.sharding.on_mesh(FUNCTIONS[mechanism], mesh, batch="data", **options)

        def function(operands, extra):
            return attend(**operands, **extra, **static)

    def put(tree, specs):
        return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), tree, specs)

    operands = put(order(operands), dict.fromkeys(operands, rows))
    cotangent, extra = put(order(cotangent), rows), put(extra, places)
    with jax.set_mesh(mesh) if style == "explicit" else contextlib.nullcontext():
        both = jax.jit(functools.partial(result_and_gradients, function))
        compiled = both.lower(operands, cotangent, extra).compile()
        out, gradients = compiled(operands, cotangent, extra)
    assert tuple(out.sharding.spec)[:2] == (
        "data" if parts < 8 else out.sharding.spec[0],
        "context",
    )
    found = jax.tree.map(np.asarray, (out, gradients))
    return (*order(found, back=True), compiled.as_text())


def check(style, parts, balanced, mechanism, shape, extra=None, static=None):
    operands, cotangent = arrays_of(shape, mechanism)
    out, gradients, text = run(
        style, parts, balanced, mechanism, operands, cotangent, extra, static
    )

    def function(operands, extra):
        return FUNCTIONS[mechanism](**operands, **extra, **(static or {}))

    want = jax.jit(functools.partial(result_and_gradients, function))
    want, want_gradients = want(operands, cotangent, extra or {})
    assert relative_error(out, want) < 1e-5
    for name, gradient in want_gradients.items():
        assert relative_error(gradients[name], gradient) < 1e-5, name
    return text


STYLES = ("shard_map", "explicit", "on_mesh")


def shape_of(parts, chunk=3, **options):
    defaults = dict(heads=4, key_heads=2, batch=(2,))
    return Shape(2 * parts * chunk, 8, **(defaults | options))


@latin("style, parts, balanced", STYLES, [2, 4, 8], [False, True], every=6)
def test_devices(parts, style, balanced):
    """Grouped heads, a ridge for every token, chunks of an odd length."""
    text = check(style, parts, balanced, "lla", shape_of(parts))
    sent = collectives(text)
    shape = shape_of(parts)
    batch = 2 if parts == 8 else 1
    whole = batch * shape.num_queries * shape.key_heads * shape.head_dim * 4
    assert sorted(sent) == ["all-gather", "reduce-scatter"]
    assert sent["all-gather"] == [whole] * 2
    assert sent["reduce-scatter"] == [whole // parts] * 2


@latin("balanced, mechanism", [False, True], ["parallax", "softmax"], marks=pytest.mark.compat)
def test_mechanisms(mechanism, balanced):
    check("shard_map", 4, balanced, mechanism, shape_of(4, key_heads=1))


def masks(shape):
    batch, length, heads = shape.batch[0], shape.num_queries, shape.heads
    rng = np.random.default_rng(0)
    ids = jnp.asarray(np.sort(rng.integers(0, 4, (batch, length)), axis=1), jnp.int32)
    dense = jnp.asarray(rng.random((batch, heads, length, length)) < 0.7)
    lengths = jnp.asarray(rng.integers(1, length + 1, batch), jnp.int32)
    offsets = jnp.asarray(rng.integers(-3, 4, batch), jnp.int32)
    return {
        "bidirectional": ({}, {"is_causal": False}),
        "lengths": ({"key_value_seq_lengths": lengths}, {"is_causal": False}),
        "offset": ({"query_offset": offsets}, {}),
        "segments": ({"segment_ids": (ids, ids)}, {}),
        "mask": ({"mask": dense}, {"is_causal": False}),
        "mask_of_keys": ({"mask": dense[:, :1, :1]}, {}),
        "window": ({}, {"local_window_size": 2}),
        "wide_window": ({}, {"local_window_size": 4}),
        "both_sides": ({}, {"local_window_size": (2, 4), "is_causal": False}),
        "window_lengths_segments": (
            {"key_value_seq_lengths": lengths, "segment_ids": (ids, ids)},
            {"local_window_size": (4, 1), "is_causal": False},
        ),
        "window_offset": ({"query_offset": offsets}, {"local_window_size": 5}),
    }


@latin("balanced, mask", [False, True], list(masks(shape_of(4))), every=3)
def test_masks(mask, balanced):
    shape = shape_of(4)
    extra, static = masks(shape)[mask]
    if mask == "mask_of_keys":
        extra = {
            "mask": jnp.broadcast_to(extra["mask"], (2, 1, shape.num_queries, shape.num_queries))
        }
    check("shard_map", 4, balanced, "lla", shape, extra, static)


@latin("style, mask", ["explicit", "on_mesh"], ["segments", "window_lengths_segments", "mask"])
def test_masks_in_other_styles(mask, style):
    shape = shape_of(4)
    extra, static = masks(shape)[mask]
    check(style, 4, True, "lla", shape, extra, static)


@latin("balanced, window", [False, True], [2, 3, 5])
def test_a_window_gathers_its_halo_alone(window, balanced):
    """Rows that are sent: those before every chunk, and their gradients back."""
    shape = shape_of(4, chunk=3)
    chunk = 3 if balanced else 6
    static = {"local_window_size": window}
    sent = collectives(check("shard_map", 4, balanced, "lla", shape, {}, static))
    assert list(sent) == ["collective-permute"]
    row = shape.key_heads * shape.head_dim * 4
    if not balanced:
        steps = [min(chunk, window - step * chunk) for step in range(-(-window // chunk))]
        assert sorted(sent["collective-permute"]) == sorted(row * n for n in steps * 4)
    # Balanced, a chunk's neighbours are one slot of one device, or of another at the turn.
    assert max(sent["collective-permute"]) <= row * min(chunk, window)


def test_keys_and_queries_of_different_lengths():
    shape = Shape(24, 8, num_keys=40, heads=2, key_heads=1, batch=(2,))
    check("shard_map", 4, True, "lla", shape, {}, {"is_causal": False})


def test_gradients_of_keys_are_summed_in_float32():
    shape = shape_of(4)
    operands, cotangent = arrays_of(shape, "softmax")
    narrow = {n: a.astype(jnp.bfloat16) for n, a in operands.items() if n != "scale"}
    narrow["scale"] = operands["scale"]
    *_, text = run("shard_map", 4, True, "softmax", narrow, cotangent.astype(jnp.bfloat16))
    kinds = re.findall(r" = (\w+)\[[\d,]*\]\S* reduce-scatter\(", text)
    assert kinds == ["f32"] * 2


def test_statistics():
    shape = shape_of(4)
    operands, _ = arrays_of(shape, "lla")
    mesh = mesh_of(4, AxisType.Auto)
    options = dict(context_axis="context", context_balance=True)
    attend = lla.sharding.on_mesh(lla.local_linear_attention, mesh, batch="data", **options)
    ordered = lla.sharding.balance(operands, 4)
    _, stats = jax.jit(functools.partial(attend, return_stats=True))(**ordered)
    _, want = jax.jit(functools.partial(lla.local_linear_attention, return_stats=True))(**operands)
    got = lla.sharding.unbalance(stats, 4)
    assert relative_error(got.lse, want.lse) < 1e-5
    assert np.abs(np.asarray(got.iterations) - np.asarray(want.iterations)).max() <= 1


# ---------------------------------------------------------------------------------------------
# The order


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_balance_and_back(parts):
    tokens = np.arange(2 * 8 * 3).reshape(2, 8 * 3)
    batch = {"tokens": tokens, "positions": np.broadcast_to(np.arange(24), (2, 24))}
    ordered = lla.sharding.balance(batch, parts)
    size = 24 // (2 * parts)
    shares = np.asarray(ordered["tokens"]).reshape(2, parts, 2, size)
    for device in range(parts):
        np.testing.assert_array_equal(shares[:, device, 0], tokens.reshape(2, -1, size)[:, device])
        last = 2 * parts - 1 - device
        np.testing.assert_array_equal(shares[:, device, 1], tokens.reshape(2, -1, size)[:, last])
    jax.tree.map(np.testing.assert_array_equal, lla.sharding.unbalance(ordered, parts), batch)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("kind", ["manual", "explicit"])
def test_positions(kind, balanced):
    want = jnp.arange(24, dtype=jnp.int32)
    want = lla.sharding.balance(want, 4, axis=0) if balanced else want

    def function(length):
        return lla.sharding.positions(length, "context", context_balance=balanced)

    if kind == "manual":
        mesh = mesh_of(4, AxisType.Auto)
        got = jax.jit(
            jax.shard_map(lambda: function(6), mesh=mesh, in_specs=(), out_specs=P("context"))
        )()
    else:
        with jax.set_mesh(mesh_of(4, AxisType.Explicit)):
            got = function(24)
    np.testing.assert_array_equal(got, want)


# ---------------------------------------------------------------------------------------------
# Errors


def test_errors_name_axis_size_and_what_would_fit():
    operands, _ = arrays_of(Shape(12, 8, heads=2, key_heads=2, batch=(2,)), "softmax")
    heads = tuple(operands[n] for n in ("query", "key", "value"))
    attend = functools.partial(lla.softmax_attention, context_axis="context")
    with pytest.raises(ValueError, match=r"'context'.*lla\.sharding\.on_mesh"):
        attend(*heads)
    mesh = mesh_of(4, AxisType.Explicit)
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=r"'context' has size 4.*got 12; 8 or 16 would fit"):
            attend(*heads, context_balance=True)
        with pytest.raises(ValueError, match=r"'rows'.*'data', 'context'"):
            lla.softmax_attention(*heads, context_axis="rows")
    with pytest.raises(ValueError, match="context_axis"):
        lla.softmax_attention(*heads, context_balance=True)
    auto = mesh_of(4, AxisType.Auto)
    on_mesh = functools.partial(lla.sharding.on_mesh, lla.softmax_attention, auto)
    with pytest.raises(ValueError, match=r"different axes of the mesh.*'context': 4"):
        on_mesh(context_axis="sequence")
    with pytest.raises(ValueError, match=r"multiple of it, got 10; 8 or 12 would fit"):
        on_mesh(context_axis="context")(*(a[:, :10] for a in heads))
    with pytest.raises(ValueError, match="splits into 4: the number of heads"):
        on_mesh(heads="context")(*heads)
    spec = P(None, "context")
    with pytest.raises(ValueError, match=r"'context' has size 4.*got 12; 8 or 16 would fit"):
        jax.shard_map(
            functools.partial(attend, context_balance=True), mesh=auto, in_specs=spec,
            out_specs=spec,
        )(*heads)  # fmt: skip
    with pytest.raises(ValueError, match="multiple of 8"):
        lla.sharding.balance(heads, 4)
