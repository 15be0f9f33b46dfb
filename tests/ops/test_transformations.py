"""jit, vmap, scan, checkpoint, shard_map; determinism and independence of rows."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lla
from tests.measure import relative_error
from tests.ops.cases import MASKS, SHAPES, Shape, make_inputs
from tests.ops.harness import EVERY, FAST, XLA_CG, XLA_DIRECT, evaluate

pytestmark = pytest.mark.compat

SHAPE = Shape(40, 8, heads=4, key_heads=2, batch=(4,))
fast = pytest.mark.parametrize("implementation", FAST, ids=str)
every = pytest.mark.parametrize("implementation", EVERY, ids=str)
# Where the solver's method adds nothing but the time to compile it.
mostly_cg = pytest.mark.parametrize(
    "implementation", [XLA_CG, pytest.param(XLA_DIRECT, marks=pytest.mark.slow)], ids=str
)


@functools.cache
def inputs(seed=0):
    arrays = make_inputs(SHAPE, seed=seed)
    return tuple(jnp.asarray(arrays[n], jnp.float32) for n in ("query", "key", "value", "ridge"))


def attend(implementation, query, key, value, ridge, **options):
    return lla.local_linear_attention(
        query, key, value, ridge=ridge, implementation=implementation.name,
        solver=implementation.solver(), **options,
    )  # fmt: skip


def value_and_grad(function):
    """Jitted outputs and gradients of a sine of them with respect to all four arguments."""

    def loss(*args):
        out = function(*args)
        return jnp.sin(out).sum(), out

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))


@functools.cache
def direct_result(implementation):
    (_, out), gradients = value_and_grad(functools.partial(attend, implementation))(*inputs())
    return out, gradients


def assert_close(actual, expected, bound=2e-5):
    """Relative Frobenius norm: summation orders may differ, and so may rows' last iterations."""
    chex.assert_trees_all_equal_shapes(actual, expected)
    assert all(e < bound for e in jax.tree.leaves(jax.tree.map(relative_error, actual, expected)))


@mostly_cg
def test_jit_equals_op_by_op(implementation):
    small = [a[:1, :12] for a in inputs()]
    function = functools.partial(attend, implementation)
    assert_close(jax.jit(function)(*small), function(*small))


@every
def test_vmap_over_the_batch(implementation):
    out, gradients = value_and_grad(jax.vmap(functools.partial(attend, implementation)))(*inputs())
    want, want_gradients = direct_result(implementation)
    assert_close((out[1], gradients), (want, want_gradients))


@mostly_cg
def test_vmap_with_shared_keys_and_ridge_alone(implementation):
    """`in_axes=None` for keys and values; then only the ridge mapped."""
    query, key, value, ridge = inputs()
    function = functools.partial(attend, implementation)
    shared = jax.jit(jax.vmap(function, in_axes=(0, None, None, 0)))
    repeated = jnp.broadcast_to(key[:1], key.shape), jnp.broadcast_to(value[:1], value.shape)
    assert_close(shared(query, key[0], value[0], ridge), jax.jit(function)(query, *repeated, ridge))

    ridges = jnp.asarray([0.3, 1.0, 30.0], jnp.float32)
    mapped = jax.jit(jax.vmap(function, in_axes=(None, None, None, 0)))
    outs = mapped(query, key, value, ridges)
    one = jax.jit(function)
    for out, r in zip(outs, ridges, strict=True):
        assert_close(out, one(query, key, value, r))


@mostly_cg
def test_gradient_of_vmap_sums_over_shared_operands(implementation):
    query, key, value, ridge = inputs()
    function = functools.partial(attend, implementation)
    shared = value_and_grad(jax.vmap(function, in_axes=(0, None, None, None)))
    (_, out), gradients = shared(query, key[0], value[0], ridge[0])

    def explicit(query, key, value, ridge):
        return function(
            query, *(jnp.broadcast_to(a[None], (4, *a.shape)) for a in (key, value, ridge))
        )

    (_, want), want_gradients = value_and_grad(explicit)(query, key[0], value[0], ridge[0])
    assert_close((out, gradients), (want, want_gradients))


@mostly_cg
def test_vmap_of_gradient_is_per_example(implementation):
    function = functools.partial(attend, implementation)
    gradient = jax.grad(lambda *args: jnp.sin(function(*args)).sum(), argnums=(0, 1, 2, 3))
    assert_close(jax.jit(jax.vmap(gradient))(*inputs()), direct_result(implementation)[1])


def layer(implementation, x, ridge):
    """Self-attention with a residual connection, enough for a stack."""
    out = attend(implementation, x, x[:, :, :2], x[:, :, 2:], ridge)
    return x + 0.5 * out


@mostly_cg
def test_scan_over_layers_equals_a_loop(implementation):
    query, _, _, ridge = inputs()
    ridges = jnp.stack([ridge, 3 * ridge, 10 * ridge])

    def scanned(x, ridges):
        step = lambda x, r: (layer(implementation, x, r), None)  # noqa: E731
        return jax.lax.scan(step, x, ridges)[0].sum()

    def looped(x, ridges):
        for r in ridges:
            x = layer(implementation, x, r)
        return x.sum()

    results = [jax.jit(jax.grad(f, argnums=(0, 1)))(query, ridges) for f in (scanned, looped)]
    # Three layers: each passes on the rounding of the one before.
    assert_close(*results, bound=1e-4)


@mostly_cg
def test_checkpoint_policy_saves_the_forward(implementation):
    """With the named residuals saved, the backward pass solves once, not twice."""
    query, _, _, ridge = inputs()
    # One tile: no loop but the solver's.
    query, ridge = query[:1, :16, :4], ridge[:1, :16]
    save = jax.checkpoint_policies.save_only_these_names(*lla.RESIDUAL_NAMES)

    def gradient(policy):
        block = lambda x: layer(implementation, x, ridge)  # noqa: E731
        if policy is not None:
            block = jax.checkpoint(block, policy=policy)
        # The sine after the layer makes its output needed, too.
        return jax.grad(lambda x: jnp.sin(block(x)).sum())

    compiled = {
        name: jax.jit(gradient(policy)).lower(query).compile()
        for name, policy in (
            ("none", None), ("named", save), ("nothing", jax.checkpoint_policies.nothing_saveable)
        )
    }  # fmt: skip
    compiled["forward"] = jax.jit(lambda x: layer(implementation, x, ridge)).lower(query).compile()
    # Counted in the compiled programs, where dead code is gone. The barriers of a checkpoint also
    # keep the compiler from sharing a loop of forward and backward, so "none" may have fewer.
    loops = {name: program.as_text().count(" while(") for name, program in compiled.items()}
    assert loops["nothing"] - loops["named"] == loops["forward"] > 0, loops
    assert loops["none"] <= loops["named"], loops
    for name in ("named", "nothing"):
        assert_close(compiled[name](query), compiled["none"](query))


@mostly_cg
def test_scan_of_checkpointed_layers(implementation):
    query, _, _, ridge = inputs()
    ridges = jnp.stack([ridge, 3 * ridge])
    save = jax.checkpoint_policies.save_only_these_names(*lla.RESIDUAL_NAMES)

    def loss(x, ridges, wrap):
        block = wrap(functools.partial(layer, implementation))
        return jnp.sin(jax.lax.scan(lambda x, r: (block(x, r), None), x, ridges)[0]).sum()

    saved = functools.partial(jax.checkpoint, policy=save)
    results = [
        jax.jit(jax.grad(functools.partial(loss, wrap=wrap), argnums=(0, 1)))(query, ridges)
        for wrap in (saved, lambda f: f)
    ]
    assert_close(*results, bound=1e-4)


@pytest.fixture(scope="module")
def mesh():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    return jax.make_mesh((4, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)


@fast
def test_shard_map_over_batch_and_heads(mesh, implementation):
    """Each device has one sequence and one key head; gradients come back sharded."""
    rows = P("data", None, "heads", None)
    sharded = jax.shard_map(
        functools.partial(attend, implementation), mesh=mesh,
        in_specs=(rows, rows, rows, P("data", None, "heads")), out_specs=rows, check_vma=True,
    )  # fmt: skip
    (_, out), gradients = value_and_grad(sharded)(*inputs())
    assert_close((out, gradients), direct_result(implementation))


@mostly_cg
def test_shard_map_with_replicated_keys(mesh, implementation):
    """Query heads sharded, the one key head on every device: its gradients are summed."""
    query, key, value, ridge = inputs()
    key, value = key[:, :, :1], value[:, :, :1]
    rows = P("data", None, "heads", None)
    function = functools.partial(attend, implementation)
    sharded = jax.shard_map(
        function, mesh=mesh, in_specs=(rows, P("data"), P("data"), P()), out_specs=rows,
        check_vma=True,
    )  # fmt: skip
    ridge = ridge[0, 0, 0]
    (_, out), gradients = value_and_grad(sharded)(query, key, value, ridge)
    (_, want), want_gradients = value_and_grad(function)(query, key, value, ridge)
    assert_close((out, gradients), (want, want_gradients))


@mostly_cg
def test_shard_map_with_every_mask(mesh, implementation):
    """Arrays of the mask shard with the batch."""
    shape = Shape(30, 8, num_keys=75, heads=2, key_heads=2, batch=(4,))
    options = MASKS["everything"].options(shape)
    arrays = make_inputs(shape)
    arrays = [jnp.asarray(arrays[n], jnp.float32) for n in ("query", "key", "value", "ridge")]
    window = options.pop("local_window_size")

    def function(query, key, value, ridge, options):
        return attend(implementation, query, key, value, ridge, local_window_size=window, **options)

    rows, batch = P("data", None, "heads"), P("data")
    specs = {name: batch for name in options} | {"segment_ids": (batch, batch)}
    specs["mask"] = P("data", "heads")
    sharded = jax.shard_map(
        function, mesh=mesh, in_specs=(rows, rows, rows, rows, specs), out_specs=rows,
        check_vma=True,
    )  # fmt: skip
    options = jax.tree.map(jnp.asarray, options)
    result = jax.jit(jax.grad(lambda *a: jnp.sin(sharded(*a)).sum(), argnums=(0, 1, 2, 3)))
    want = jax.jit(jax.grad(lambda *a: jnp.sin(function(*a)).sum(), argnums=(0, 1, 2, 3)))
    assert_close(result(*arrays, options), want(*arrays, options))


@mostly_cg
def test_jit_with_sharded_inputs(mesh, implementation):
    """Without shard_map the compiler partitions; results do not change."""
    sharding = NamedSharding(mesh, P("data"))
    placed = [jax.device_put(a, sharding) for a in inputs()]
    (_, out), gradients = value_and_grad(functools.partial(attend, implementation))(*placed)
    assert_close((out, gradients), direct_result(implementation))


# ---------------------------------------------------------------------------------------------
# Bit for bit


@every
def test_two_runs_are_equal_bit_for_bit(implementation):
    arrays = make_inputs(SHAPES["length_129"])
    first, second = (evaluate(arrays, implementation) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


@every
@pytest.mark.parametrize("token", [1, 64, 128])
def test_strict_causality(token, implementation):
    """A changed token leaves every earlier output and query gradient as it was, bit for bit."""
    arrays = make_inputs(SHAPES["length_129"])
    changed = {name: array.copy() for name, array in arrays.items()}
    for name in ("query", "key", "value"):
        changed[name][:, token] = 5 - 3 * changed[name][:, token]
    before, after = evaluate(arrays, implementation), evaluate(changed, implementation)
    np.testing.assert_array_equal(before.out[:, :token], after.out[:, :token])
    np.testing.assert_array_equal(before.stats.lse[:, :token], after.stats.lse[:, :token])
    for name in ("query", "ridge", "scale"):
        np.testing.assert_array_equal(
            before.gradients[name][:, :token], after.gradients[name][:, :token]
        )
    assert (before.out[:, token:] != after.out[:, token:]).any()


@every
def test_sequences_are_independent_bit_for_bit(implementation):
    """Another sequence of the batch, however hard, changes nothing."""
    shape = SHAPES["grouped_heads"]
    arrays, hard = make_inputs(shape), make_inputs(shape, "sharp", ridge=1e-3, seed=1)
    other = {name: np.concatenate([arrays[name][:1], hard[name][1:]]) for name in arrays}
    first, second = evaluate(arrays, implementation), evaluate(other, implementation)
    np.testing.assert_array_equal(first.out[0], second.out[0])
    for name, gradient in first.gradients.items():
        np.testing.assert_array_equal(gradient[0], second.gradients[name][0], err_msg=name)


@pytest.mark.parametrize("split", [[24, 16], [1, 39]])
def test_chunked_prefill_equals_the_whole(split):
    """Queries in chunks against all keys, their offsets a number or an array."""
    query, key, value, ridge = inputs()
    want = direct_result(XLA_CG)[0]
    function = jax.jit(functools.partial(attend, XLA_CG))
    start = 0
    for size in split:
        rows = slice(start, start + size)
        offset = jnp.int32(start) if start else jnp.full(4, start, jnp.int32)
        out = function(query[:, rows], key, value, ridge[:, rows], query_offset=offset)
        assert_close(out, want[:, rows])
        start += size


@every
def test_no_library_call_that_can_wait_for_its_own_threads(implementation):
    """On a CPU, LAPACK calls on batches block a thread of the pool that has to serve them.

    Two independent ones, such as those of forward and backward pass, then wait for each other for
    ever where the pool has two threads. The eight devices of these tests give it eight, so that
    the text of the program is checked instead.
    """
    if jax.default_backend() != "cpu":
        pytest.skip("about the CPU's thread pool")
    gradient = value_and_grad(functools.partial(attend, implementation))
    assert "lapack" not in gradient.lower(*inputs()).as_text()
