"""Arrays on several devices: jit with Auto axes, Explicit axes, shard_map; no collectives."""

import contextlib
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lla
from tests.measure import latin
from tests.ops.cases import MASKS, Shape, make_inputs
from tests.ops.harness import FUNCTIONS, relative_error

if jax.device_count() < 8:
    pytest.skip("needs 8 devices", allow_module_level=True)

AUTO = jax.make_mesh((4, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
EXPLICIT = jax.make_mesh((4, 2), ("data", "heads"))
STYLES = ("auto", "explicit", "shard_map")
style = pytest.mark.parametrize("style", STYLES)
SHAPE = Shape(21, 8, heads=4, key_heads=4, batch=(8,))
FLOATS = {
    "lla": ("query", "key", "value", "ridge", "scale"),
    "parallax": ("query", "key", "value", "probe", "scale"),
    "softmax": ("query", "key", "value", "scale"),
}
BATCH, HEADS = P("data"), P(None, None, "heads")
PLACES = {
    "batch": (BATCH, BATCH),
    "heads": (HEADS, HEADS),
    "both": (P("data", None, "heads"), P("data", None, "heads")),
    "two_axes": (P(("data", "heads")), P(("data", "heads"))),
}


def collectives(text: str) -> dict[str, int]:
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    counts = {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in names}
    return {name: count for name, count in counts.items() if count}


@functools.cache
def arrays_of(shape: Shape, mechanism: str, seed: int = 0):
    """The differentiable operands, and a cotangent."""
    arrays = make_inputs(shape, seed=seed)
    arrays = {name: jnp.asarray(a, jnp.float32) for name, a in arrays.items()}
    return {name: arrays[name] for name in FLOATS[mechanism]}, arrays["cotangent"]


def value_and_gradients(function):
    """``(operands, cotangent, extra) -> output and gradients``."""

    def call(operands, cotangent, extra):
        out, pullback = jax.vjp(lambda operands: function(operands, extra), operands)
        return out, pullback(cotangent)[0]

    return call


def attend(mechanism: str, **options):
    def function(operands, extra):
        return FUNCTIONS[mechanism](**operands, **extra, **options)

    return function


def trimmed(spec: P) -> P:
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


class Run:
    """One function in one style: results, their shardings, and the compiled texts."""

    def __init__(
        self, style, function, operands, cotangent, specs, extra=None, extra_specs=None, out=None
    ):
        extra, extra_specs = extra or {}, extra_specs or {}
        out_spec = specs["query"] if out is None else out
        mesh = EXPLICIT if style == "explicit" else AUTO

        def put(tree, specs):
            return jax.tree.map(
                lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), tree, specs
            )

        if style == "shard_map":
            function = jax.shard_map(
                function, mesh=mesh, in_specs=(specs, extra_specs), out_specs=out_spec
            )
        operands, cotangent = put(operands, specs), put(cotangent, out_spec)
        extra = put(extra, extra_specs)
        with jax.set_mesh(mesh) if style == "explicit" else contextlib.nullcontext():
            compiled = jax.jit(function).lower(operands, extra).compile()
            self.forward = collectives(compiled.as_text())
            both = jax.jit(value_and_gradients(function))
            both = both.lower(operands, cotangent, extra).compile()
            self.text = both.as_text()
            self.both = collectives(self.text)
            self.out, self.gradients = both(operands, cotangent, extra)


def row_specs(names, query, key):
    specs = {name: key if name in ("key", "value") else query for name in names}
    return specs


def check(run: Run, function, operands, cotangent, specs, extra=None, bound=1e-5):
    want, gradients = jax.jit(value_and_gradients(function))(operands, cotangent, extra or {})
    assert relative_error(run.out, want) < bound
    assert trimmed(run.out.sharding.spec) == trimmed(specs["query"])
    for name, gradient in gradients.items():
        assert relative_error(run.gradients[name], gradient) < bound, name
        assert trimmed(run.gradients[name].sharding.spec) == trimmed(specs[name]), name


# ---------------------------------------------------------------------------------------------
# Results, shardings and collectives


@latin("style, mechanism, place", STYLES, list(FUNCTIONS), list(PLACES), marks=pytest.mark.compat)
def test_what_is_independent_needs_no_collective(style, mechanism, place):
    operands, cotangent = arrays_of(SHAPE, mechanism)
    specs = row_specs(operands, *PLACES[place])
    specs |= {name: P(*specs["query"][:3]) for name in ("ridge", "scale") if name in specs}
    function = attend(mechanism)
    run = Run(style, function, operands, cotangent, specs)
    check(run, function, operands, cotangent, specs)
    assert (run.forward, run.both) == ({}, {})


@latin("style, mechanism, key_heads", STYLES, list(FUNCTIONS), [1, 2], every=6)
def test_grouped_heads(style, mechanism, key_heads):
    """Query heads over four devices, fewer key heads on all of them, whose gradients are summed."""
    if style == "shard_map" and key_heads == 2:
        pytest.skip("inside a shard_map of its own a device has the key heads that it is given")
    shape = Shape(21, 8, heads=4, key_heads=key_heads, batch=(2,))
    operands, cotangent = arrays_of(shape, mechanism)
    heads = P(None, None, "data")
    specs = row_specs(operands, heads, P())
    function = attend(mechanism)
    run = Run(style, function, operands, cotangent, specs)
    check(run, function, operands, cotangent, specs)
    assert run.forward == {}
    assert set(run.both) <= {"all-reduce"}


@pytest.mark.parametrize("style", ["auto", "explicit"])
def test_gradients_of_whole_keys_in_16_bits(style):
    """Each device has a part of the sum; in Auto mode they are added in float32."""
    shape = Shape(21, 8, heads=4, key_heads=1, batch=(2,))
    operands, cotangent = arrays_of(shape, "softmax")
    operands = {n: a if n == "scale" else a.astype(jnp.bfloat16) for n, a in operands.items()}
    cotangent = cotangent.astype(jnp.bfloat16)
    specs = row_specs(operands, P(None, None, "heads"), P())
    function = attend("softmax")
    run = Run(style, function, operands, cotangent, specs)
    check(run, function, operands, cotangent, specs, bound=1e-2)
    if style == "auto":
        assert not re.search(r"bf16\[[\d,]*\]\S* all-reduce\(", run.text)


@style
def test_key_heads_lie_with_their_query_heads(style):
    shape = Shape(21, 8, heads=4, key_heads=2, batch=(4,))
    operands, cotangent = arrays_of(shape, "lla")
    specs = row_specs(operands, P("data", None, "heads"), P("data", None, "heads"))
    function = attend("lla")
    run = Run(style, function, operands, cotangent, specs)
    check(run, function, operands, cotangent, specs)
    assert (run.forward, run.both) == ({}, {})


@pytest.mark.parametrize("style", ["auto", "explicit"])
def test_groups_cut_apart(style):
    """Three query heads to a device, two to a key head."""
    shape = Shape(13, 8, heads=6, key_heads=3, batch=(2,))
    operands, cotangent = arrays_of(shape, "lla")
    specs = row_specs(operands, P(None, None, "heads"), P())
    function = attend("lla")
    run = Run(style, function, operands, cotangent, specs)
    check(run, function, operands, cotangent, specs)
    assert run.forward == {}


@style
def test_ridge_of_each_head(style):
    """Its gradient is summed over the batch."""
    operands, cotangent = arrays_of(SHAPE, "lla")
    operands = operands | {"ridge": operands["ridge"][0, 0], "scale": operands["scale"][0, 0, 0]}
    specs = row_specs(operands, P("data", None, "heads"), P("data", None, "heads"))
    specs |= {"ridge": P("heads"), "scale": P()}
    function = attend("lla")
    run = Run(style, function, operands, cotangent, specs)
    check(run, function, operands, cotangent, specs)
    assert run.forward == {} and set(run.both) == {"all-reduce"}


@latin(
    "style, mask",
    STYLES,
    [name for name in MASKS if name not in ("none", "empty_sequence")],
    every=6,
)
def test_masks(style, mask):
    shape = Shape(30, 8, num_keys=37, heads=4, key_heads=2, batch=(4,))
    options = {n: o for n, o in MASKS[mask].options(shape).items()}
    static = {n: o for n, o in options.items() if n in ("is_causal", "local_window_size")}
    extra = jax.tree.map(jnp.asarray, {n: o for n, o in options.items() if n not in static})
    operands, cotangent = arrays_of(shape, "lla")
    both = P("data", None, "heads")
    specs = row_specs(operands, both, both)
    places = dict.fromkeys(extra, P("data")) | {"segment_ids": (P("data"), P("data"))}
    places = {name: places[name] for name in extra}
    if "mask" in extra:
        sizes = (("data", 4), ("heads", 4))
        places["mask"] = P(
            *(
                name if size == full else None
                for (name, full), size in zip(sizes, extra["mask"].shape, strict=False)
            )
        )
    for name in ("query_offset", "key_value_seq_lengths"):
        if name in extra and extra[name].ndim == 0:
            places[name] = P()
    function = attend("lla", **static)
    run = Run(style, function, operands, cotangent, specs, extra, places)
    check(run, function, operands, cotangent, specs, extra)
    assert (run.forward, run.both) == ({}, {})


@pytest.mark.parametrize("style", ["auto", "explicit"])
def test_two_leading_axes(style):
    shape = Shape(13, 8, heads=2, key_heads=2, batch=(2, 4))
    operands, cotangent = arrays_of(shape, "lla")
    spec = P("heads", "data")
    specs = row_specs(operands, spec, spec)
    function = attend("lla")
    run = Run(style, function, operands, cotangent, specs)
    check(run, function, operands, cotangent, specs)
    assert (run.forward, run.both) == ({}, {})


@latin("style, implementation", ["auto", "explicit"], ["reference", "xla"])
def test_implementations(style, implementation):
    operands, cotangent = arrays_of(SHAPE, "lla")
    both = P("data", None, "heads")
    specs = row_specs(operands, both, both)
    function = attend("lla", implementation=implementation)
    run = Run(style, function, operands, cotangent, specs)
    check(run, function, operands, cotangent, specs)
    assert (run.forward, run.both) == ({}, {})


@pytest.mark.parametrize("style", ["auto", "explicit"])
def test_queries_over_devices(style):
    """Rows are independent, so they stay where they are; the keys are on all devices."""
    shape = Shape(24, 8, heads=2, key_heads=1, batch=(2,))
    operands, cotangent = arrays_of(shape, "lla")
    specs = row_specs(operands, P(None, "data"), P())
    function = attend("lla", local_window_size=9)
    run = Run(style, function, operands, cotangent, specs)
    check(run, function, operands, cotangent, specs)
    assert run.forward == {} and set(run.both) == {"all-reduce"}


# ---------------------------------------------------------------------------------------------
# What cannot be served


@pytest.mark.parametrize("style", ["auto", "explicit"])
@pytest.mark.parametrize(
    "query, key, axis, remedy",
    [
        (P("data"), P("data", "heads"), "key axis", "context_axis='heads'"),
        (P("data", None, None, "heads"), P("data"), "head dimension", "Shard batch or heads"),
        (P("data"), P("data", None, None, "heads"), "head dimension", "Shard batch or heads"),
    ],
)
def test_what_cannot_be_served_is_gathered_with_a_warning(style, query, key, axis, remedy):
    shape = Shape(24, 8, heads=2, key_heads=2, batch=(4,))
    operands, cotangent = arrays_of(shape, "softmax")
    specs = row_specs(operands, query, key) | {"scale": P("data")}
    function = attend("softmax")
    with pytest.warns(UserWarning) as caught:
        run = Run(style, function, operands, cotangent, specs, out=P("data"))
    said = [str(w.message) for w in caught]
    assert any("'heads'" in s and axis in s and remedy in s for s in said), said
    want, gradients = jax.jit(value_and_gradients(function))(operands, cotangent, {})
    assert relative_error(run.out, want) < 1e-5
    for name, gradient in gradients.items():
        assert relative_error(run.gradients[name], gradient) < 1e-5, name


# ---------------------------------------------------------------------------------------------
# Transformations


@pytest.mark.compat
@pytest.mark.parametrize(
    "style, place", [("auto", "mapped"), ("auto", "inner"), ("explicit", "inner")]
)
def test_vmap(style, place):
    """Along an Explicit axis JAX cannot map what holds a `shard_map` with a loop."""
    shape = Shape(13, 8, heads=2, key_heads=2, batch=(8, 2))
    operands, cotangent = arrays_of(shape, "lla")
    operands = operands | {"scale": jnp.float32(0.3)}
    spec = P("data") if place == "mapped" else P(None, None, None, "heads")
    specs = row_specs(operands, spec, spec) | {"scale": P()}
    axes = {name: None if name == "scale" else 0 for name in operands}
    name = "data" if place == "mapped" and style == "auto" else None

    def function(operands, extra):
        inner = functools.partial(attend("lla"), extra=extra)
        return jax.vmap(inner, in_axes=(axes,), spmd_axis_name=name)(operands)

    run = Run(style, function, operands, cotangent, specs)
    check(run, function, operands, cotangent, specs)
    assert run.forward == {} and set(run.both) <= {"all-reduce"}


@pytest.mark.parametrize("style", ["auto", "explicit"])
def test_scan_and_checkpoint(style):
    operands, cotangent = arrays_of(SHAPE, "lla")
    spec = P("data", None, "heads")
    specs = row_specs(operands, spec, spec)
    policy = jax.checkpoint_policies.save_only_these_names(*lla.RESIDUAL_NAMES)

    def function(operands, extra):
        @functools.partial(jax.checkpoint, policy=policy)
        def step(query, _):
            return attend("lla")(operands | {"query": query}, extra), None

        return jax.lax.scan(step, operands["query"], None, length=2)[0]

    run = Run(style, function, operands, cotangent, specs)
    check(run, function, operands, cotangent, specs)
    assert (run.forward, run.both) == ({}, {})


def test_a_checkpoint_that_saves_residuals_solves_once():
    """As without devices: the loop of the forward solve is not in the backward pass."""
    operands, _ = arrays_of(SHAPE, "lla")
    placed = jax.device_put(operands, NamedSharding(AUTO, BATCH))

    def loops(policy):
        function = jax.checkpoint(lambda o: attend("lla")(o, {}).sum(), policy=policy)
        return (
            jax.jit(jax.value_and_grad(function)).lower(placed).compile().as_text().count(" while(")
        )

    names = jax.checkpoint_policies.save_only_these_names(*lla.RESIDUAL_NAMES)
    assert loops(names) < loops(jax.checkpoint_policies.nothing_saveable)


@pytest.mark.compat
def test_second_derivatives():
    shape = Shape(9, 4, heads=2, key_heads=2, batch=(4,))
    operands, _ = arrays_of(shape, "lla")
    solver = lla.Solver(tol=1e-7, backward_tol=1e-7)

    def curvature(operands):
        def loss(query):
            function = attend("lla", solver=solver, implementation="xla")
            return jnp.sin(function(operands | {"query": query}, {})).sum()

        return jax.grad(lambda q: jnp.square(jax.grad(loss)(q)).sum())(operands["query"])

    want = jax.jit(curvature)(operands)
    placed = jax.device_put(operands, NamedSharding(AUTO, BATCH))
    assert relative_error(jax.jit(curvature)(placed), want) < 1e-4


@pytest.mark.parametrize("style", ["auto", "explicit"])
def test_without_jit(style):
    operands, _ = arrays_of(SHAPE, "lla")
    want = attend("lla")(operands, {})
    mesh = EXPLICIT if style == "explicit" else AUTO
    placed = jax.device_put(operands, NamedSharding(mesh, BATCH))
    out = attend("lla")(placed, {})
    assert relative_error(out, want) < 1e-5
    assert trimmed(out.sharding.spec) == BATCH


def test_known_ridge_chooses_the_same_solver():
    """A ridge array that is known before it is traced counts as on one device."""
    operands, _ = arrays_of(SHAPE, "lla")
    ridge = np.full((4,), 0.001, np.float32)

    def function(operands):
        return lla.local_linear_attention(
            operands["query"], operands["key"], operands["value"], ridge=ridge, return_stats=True
        )

    with jax.default_device(jax.devices()[0]):
        want = jax.jit(function)(operands)[1].iterations
    placed = jax.device_put(operands, NamedSharding(AUTO, BATCH))
    np.testing.assert_array_equal(jax.jit(function)(placed)[1].iterations, want)


def test_wrong_arguments_are_named_as_on_one_device():
    operands, _ = arrays_of(SHAPE, "softmax")
    placed = jax.device_put(operands, NamedSharding(AUTO, BATCH))
    with pytest.raises(ValueError, match="equal head_dim"):
        lla.softmax_attention(placed["query"], placed["key"][..., :4], placed["value"])
    with pytest.raises(ValueError, match="ridge must be positive"):
        lla.local_linear_attention(
            placed["query"], placed["key"], placed["value"], ridge=np.zeros(4, np.float32)
        )


# ---------------------------------------------------------------------------------------------
# Decoding


@latin("style, mechanism", ["auto", "explicit"], list(FUNCTIONS))
def test_decoding(style, mechanism):
    """A prompt and a token; output and cache stay where the cache lies."""
    shape = Shape(7, 8, heads=4, key_heads=2, batch=(4,))
    arrays = {n: jnp.asarray(a, jnp.float32) for n, a in make_inputs(shape).items()}
    tokens = ("query", "key", "value") + (("probe",) if mechanism == "parallax" else ())
    step = {
        "lla": functools.partial(lla.decode_step, ridge=1.0),
        "parallax": lla.parallax_decode_step,
        "softmax": lla.softmax_decode_step,
    }[mechanism]
    cache = lla.KVCache.create(4, 16, 2, 8, dtype=jnp.float32)
    counts = jnp.asarray([7, 5, 0, 6], jnp.int32)

    def both(arrays, cache, counts):
        prompt, token = (
            {n: arrays[n][:, rows] for n in tokens} for rows in (slice(None), slice(2, 3))
        )
        first, cache = step(**prompt, cache=cache, new_lengths=counts)
        second, cache = step(**token, cache=cache)
        return first, second, cache

    want = jax.jit(both)(arrays, cache, counts)
    mesh = EXPLICIT if style == "explicit" else AUTO
    rows, batch = NamedSharding(mesh, P("data", None, "heads")), NamedSharding(mesh, P("data"))
    places = jax.tree.map(lambda a: rows if a.ndim > 1 else batch, (arrays, cache, counts))
    with jax.set_mesh(mesh) if style == "explicit" else contextlib.nullcontext():
        placed = jax.device_put((arrays, cache, counts), places)
        compiled = jax.jit(both).lower(*placed).compile()
        assert collectives(compiled.as_text()) == {}
        found = compiled(*placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < 1e-5
    assert all(trimmed(a.sharding.spec) == rows.spec for a in (*found[:2], found[2].key))


def test_no_warning_without_reason():
    operands, _ = arrays_of(SHAPE, "lla")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for spec in (P(), BATCH, HEADS):
            placed = jax.device_put(operands["query"], NamedSharding(AUTO, spec))
            jax.jit(functools.partial(lla.softmax_attention, key=placed, value=placed))(placed)
