"""Names, options and errors of the registry, and weight decay of what it builds."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lla.nn
from lla import mixers
from lla.mixers.parts import NoDecay

every = pytest.mark.parametrize("name", mixers.names())


def shapes(name, width=64, num_heads=4, **options):
    """Shapes of the parameters, without computing them."""
    build = lambda: mixers.create(name, width, num_heads, rngs=nnx.Rngs(0), **options)  # noqa: E731
    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(build), nnx.Param))
    return {".".join(map(str, path)): variable.shape for path, variable in state}


@every
def test_options_are_plain_and_accepted(name):
    options = mixers.options(name)
    assert {"dtype", "param_dtype", "rngs", "width", "num_heads"}.isdisjoint(options)
    assert "short_conv" not in options or options["short_conv"] == 0
    for value in options.values():
        assert value is None or type(value) in (bool, int, float, str)
    assert shapes(name, **options) == shapes(name)


def test_options_of_a_recurrence():
    assert mixers.options("retnet") == {
        "head_dim": None,
        "value_dim": None,
        "rope_theta": 10000.0,
        "short_conv": 0,
        "form": "parallel",
        "chunk": 64,
    }


@every
def test_those_that_cannot_tell_the_order_need_positions(name):
    mixer = mixers.create(name, 16, 2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 4, 16))
    swapped = x[:, jnp.array([1, 0, 2, 3])]
    out, other = (nnx.jit(lambda mixer, x: mixer(x)[:, -1])(mixer, each) for each in (x, swapped))
    assert bool(jnp.allclose(out, other, rtol=1e-4, atol=1e-5)) == mixers.uses_positions(name)


@pytest.mark.parametrize(
    "name, count",
    [
        # Width 64, 4 heads of 16: three projections in, one out, and two or one norms of heads.
        ("softmax", 4 * 64 * 64 + 2 * 16),
        ("lla", 4 * 64 * 64 + 2 * 16),
        ("parallax", 5 * 64 * 64 + 2 * 16),
        ("linear", 4 * 64 * 64 + 16),
        ("retnet", (1 + 1 + 2 + 2 + 2) * 64 * 64),
        # q and k of half the width; gate and its bias; decay of rank 16 and its bias; norm.
        ("gla", (0.5 + 0.5 + 1 + 1 + 1) * 64 * 64 + 64 + 16 * (64 + 32) + 32 + 16),
        # u, z, out; B, C of 16; Delta of rank 4; dt_bias, D and A_log of 128 channels.
        ("mamba", 3 * 64 * 128 + 2 * 128 * 16 + 2 * 4 * 128 + 128 * (1 + 1 + 16)),
        # u, z, out; B, C of 128; Delta of 4 heads; dt_bias, D and A_log; norm.
        ("mamba2", 3 * 64 * 128 + 2 * 64 * 128 + 64 * 4 + 3 * 4 + 128),
    ],
)
def test_numbers_of_parameters(name, count):
    sizes = [jax.ShapeDtypeStruct(shape, jnp.float32).size for shape in shapes(name).values()]
    assert sum(sizes) == count


@pytest.mark.parametrize(
    "name", [name for name in mixers.names() if "short_conv" in mixers.options(name)]
)
def test_short_convolutions_are_filters_and_perhaps_biases(name):
    plain, convolved = shapes(name), shapes(name, short_conv=3)
    filters = {path: shape for path, shape in convolved.items() if path.endswith(".filter")}
    biases = {path for path in convolved if path.endswith("convolution.bias")}
    assert filters and all(shape[0] == 3 for shape in filters.values())
    assert len(plain) == len(convolved) - len(filters) - len(biases)


def test_errors_name_the_nearest():
    with pytest.raises(ValueError, match=r"unknown mixer: 'mamba3'; did you mean 'mamba'"):
        mixers.create("mamba3", 16, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"unknown mixer: 'softmx'; did you mean 'softmax'"):
        mixers.options("softmx")
    with pytest.raises(ValueError, match=r"option of mixer 'gla': 'expandk'.*'expand_k'"):
        mixers.create("gla", 16, 2, rngs=nnx.Rngs(0), expandk=1.0)
    with pytest.raises(ValueError, match="unknown mixer"):
        mixers.uses_positions("attention")


@pytest.mark.parametrize(
    "name, sizes, options, message",
    [
        ("softmax", (0, 2), {}, "width must"),
        ("softmax", (16, 0), {}, "num_heads must"),
        ("softmax", (16.0, 2), {}, "width must"),
        ("softmax", (16, 3), {}, r"width \(16\) must be a multiple of num_heads \(3\)"),
        ("softmax", (16, 2), dict(head_dim=0), "head_dim must"),
        ("softmax", (16, 2), dict(scale=1.0, relative_scale=1.0), "exclude each other"),
        ("softmax", (16, 2), dict(short_conv=-1), "at least one tap"),
        ("softmax", (16, 2), dict(head_dim=3, rope_theta=10.0), "even head_dim"),
        ("parallax", (16, 3), {}, "multiple of num_heads"),
        ("parallax", (16, 4), dict(num_kv_heads=3), "num_kv_heads"),
        ("lla", (16, 3), {}, "multiple of num_heads"),
        ("lla", (16, 2), dict(ridge=0.0), "ridge must"),
        ("lla", (16, 2), dict(solver="newton"), "Solver.method"),
        ("lla", (16, 2), dict(solver_tol=2.0), "Solver.tol"),
        ("linear", (16, 3), {}, "multiple of num_heads"),
        ("linear", (16, 2), dict(value_dim=0), "value_dim must"),
        ("linear", (16, 2), dict(feature_map="exp"), "feature_map must"),
        ("linear", (16, 2), dict(normalize=True), "positive features"),
        (
            "linear",
            (16, 2),
            dict(normalize=True, feature_map="elu", rope_theta=10.0),
            "positive features",
        ),
        ("linear", (16, 2), dict(head_dim=3, rope_theta=10.0), "even head_dim"),
        ("linear", (16, 2), dict(form="chunked"), "form must"),
        ("retnet", (16, 3), {}, "multiple of num_heads"),
        ("retnet", (16, 2), dict(head_dim=3), "even head_dim"),
        ("retnet", (16, 2), dict(chunk=0), "chunk must"),
        ("gla", (16, 16), {}, "expand_k"),
        ("gla", (16, 2), dict(expand_v=0.3), "expand_v"),
        ("gla", (16, 2), dict(gate_rank=0), "rank must"),
        ("gla", (16, 2), dict(gate_temperature=0.0), "gate_temperature must"),
        ("mamba", (16, 2), dict(expand=0.0), "expand"),
        ("mamba", (16, 2), dict(state_size=0), "state_size must"),
        ("mamba", (16, 2), dict(step_rank=0), "step_rank must"),
        ("mamba2", (16, 3), {}, "expand"),
        ("mamba2", (16, 2), dict(state_size=0), "state_size must"),
    ],
)
def test_bad_sizes_and_options_are_named(name, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        mixers.create(name, *sizes, rngs=nnx.Rngs(0), **options)


@every
def test_weight_decay_spares_what_must_not_decay(name):
    """By type in a state of variables, and by name in a tree of bare arrays."""
    options = {"ridge_type": "per_token"} if name == "lla" else {}
    build = lambda: mixers.create(name, 16, 2, rngs=nnx.Rngs(0), **options)  # noqa: E731
    state = nnx.state(nnx.List([nnx.eval_shape(build)]), nnx.Param)
    named = {path for path, variable in nnx.to_flat_state(state) if isinstance(variable, NoDecay)}
    learned_ridge = {(0, "ridge", "bias"), (0, "ridge", "kernel")} if name == "lla" else set()
    mask = lla.nn.weight_decay_mask(state)
    assert jax.tree.structure(mask) == jax.tree.structure(state)
    spared = {path for path, decays in nnx.to_flat_state(mask) if not decays.get_value()}
    assert spared == named | learned_ridge
    pure = lla.nn.weight_decay_mask(nnx.to_pure_dict(state))
    leaves = jax.tree_util.tree_leaves_with_path(pure)
    assert {tuple(key.key for key in path) for path, decays in leaves if not decays} == spared
    assert len(leaves) == len(jax.tree.leaves(state))
