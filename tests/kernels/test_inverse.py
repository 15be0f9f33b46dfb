"""The arithmetic of the direct solver's kernels, run with NumPy instead of Pallas references."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need JAX 0.11"),
]

ROWS = 128


class Memory:
    """An array with the part of the interface of a reference that the kernels use."""

    def __init__(self, array, index=()):
        self.array, self.index = array, index
        self.shape = array[index].shape

    @property
    def at(self):
        return _At(self)

    def __getitem__(self, index):
        assert index is Ellipsis
        return self.array[self.index].copy()

    def __setitem__(self, index, value):
        assert index is Ellipsis
        self.array[self.index] = value


class _At:
    def __init__(self, memory):
        self.memory = memory

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        index = tuple(slice(i.start, i.start + i.size) if hasattr(i, "size") else i for i in index)
        return Memory(
            self.memory.array, tuple(i if isinstance(i, slice) else int(i) for i in index)
        )


def loop(low, high, body, carry):
    for i in range(low, high):
        carry = body(i, carry)
    return carry


def invert(monkeypatch, sums, ridge, dim):
    """The inverses ``[rows, dim, 32]`` that the kernel writes; NaN where it writes nothing."""
    from lla.kernels.mosaic_gpu import inverse, launch, tile

    plain = types.SimpleNamespace(
        fori_loop=loop, axis_index=lambda name: 0, div=lambda a, b: int(a) // int(b),
        rem=lambda a, b: int(a) % int(b),
    )  # fmt: skip
    monkeypatch.setattr(inverse, "lax", plain)
    monkeypatch.setattr(inverse, "jnp", np)
    shape = launch.Shape(1, ROWS, ROWS, 1, 1, 32, jnp.dtype(jnp.bfloat16))
    given = {"sums": Memory(sums[None, None]), "ridge": Memory(ridge[None, None])}
    out = np.full((1, 1, dim, 32, ROWS), np.nan, np.float32)
    arithmetic = tile.Arithmetic(interpreted=True)
    inverse._Invert(shape, dim, arithmetic, given, {"inverse": Memory(out)}).run()
    return np.moveaxis(out[0, 0], -1, 0)


def sums_of(keys, weights, dim):
    """The sums ``[F, rows]`` of `moments`, for ``keys [n, dim]`` and ``weights [rows, n]``."""
    from lla.kernels.mosaic_gpu import inverse

    found = np.zeros((ROWS, inverse.num_sums(dim)))
    a, b = np.tril_indices(dim)
    found[:, : len(a)] = weights @ (keys[:, a] * keys[:, b])
    found[:, len(a) : len(a) + dim] = weights @ keys
    found[:, len(a) + dim] = weights.sum(1)
    return found.T.astype(np.float32)


def systems(keys, weights, ridge):
    """The exact systems, in float64."""
    total = np.maximum(weights.sum(1, keepdims=True), 1e-300)
    weights = weights / total
    mean = weights @ keys
    second = np.einsum("rn,na,nb->rab", weights, keys, keys)
    second -= mean[:, :, None] * mean[:, None]
    return second + ridge[:, None, None] * np.eye(keys.shape[1])


@pytest.mark.parametrize("dim", [16, 32])
def test_inverses(monkeypatch, dim):
    rng = np.random.default_rng(0)
    keys, weights = rng.standard_normal((60, dim)), rng.random((ROWS, 60)) ** 8
    weights[5] = 0  # a row that sees no keys
    ridge = np.logspace(-2, 1, ROWS)
    system = systems(keys, weights, ridge)
    system[5] = ridge[5] * np.eye(dim)
    found = invert(monkeypatch, sums_of(keys, weights, dim), ridge.astype(np.float32), dim)
    assert np.isfinite(found).all()
    assert (found[:, :, dim:] == 0).all()
    want = np.linalg.inv(system)
    error = np.linalg.norm(found[:, :, :dim] - want, axis=(1, 2)) / np.linalg.norm(
        want, axis=(1, 2)
    )
    assert error.max() < 3e-4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("scale", [1000, 1e12])
@pytest.mark.parametrize("dim", [16, 32])
def test_systems_spoilt_by_rounding_get_a_zero_inverse(monkeypatch, dim, scale):
    # Keys on a line far away. The covariances are differences of numbers near scale^2, whose
    # rounding errors are far above the ridge in nearly all rows.
    rng = np.random.default_rng(0)
    keys = (scale + rng.standard_normal((60, 1))) * rng.uniform(0.5, 1.5, dim)
    weights = rng.random((ROWS, 60))
    ridge = np.full(ROWS, 1e-3, np.float32)
    sums = sums_of(keys, weights, dim)
    usual = rng.standard_normal((60, dim))
    sums[:, 7] = sums_of(usual, weights, dim)[:, 7]
    found = invert(monkeypatch, sums, ridge, dim)[:, :, :dim]
    want = np.linalg.inv(systems(usual, weights, ridge)[7])
    assert np.linalg.norm(found[7] - want) < 1e-4 * np.linalg.norm(want)
    assert np.isfinite(found).all()
    none = (found == 0).all(axis=(1, 2))
    assert none.mean() > 0.9
    # The inverses that are kept are positive definite.
    assert np.linalg.eigvalsh(found[~none].astype(np.float64)).min() > 0


def test_limits_agree_with_the_kernels():
    from lla.kernels.mosaic_gpu import configs, inverse
    from lla.ops.mosaic_gpu import hopper as mosaic_gpu

    assert mosaic_gpu._MAX_DIRECT_DIM == configs.DIRECT_DIM == inverse.system_dim(17)
    assert configs.choose(configs.DIRECT_DIM).solve_direct is not None
    for head_dim in (1, 16, 17, 32):
        size = 4 * inverse.system_dim(head_dim) * configs.DIRECT_DIM
        assert mosaic_gpu._inverse_bytes(head_dim, 3) == 3 * size


def test_centred_keys():
    from lla.kernels.mosaic_gpu import inverse

    rng = np.random.default_rng(0)
    key = jnp.asarray(rng.standard_normal((2, 40, 3, 32)) + 5, jnp.bfloat16)
    key = key.at[..., 10:].set(0)  # 10 dimensions, padded
    key = key.at[0, 30].set(jnp.nan)
    found = inverse.centred(key, jnp.asarray([40, 25]), 16)
    assert found.dtype == jnp.float32 and found.shape == (2, 3, 16, 40)
    exact = np.moveaxis(np.asarray(key, np.float64), 1, -1)[:, :, :16]
    for sequence, there in enumerate([np.delete(np.arange(40), 30), np.arange(25)]):
        want = exact[sequence] - exact[sequence][..., there].mean(-1, keepdims=True)
        np.testing.assert_allclose(found[sequence], want, atol=2e-6)
    assert not found[1, :, 10:].any()


@pytest.mark.parametrize("dim", [16, 32])
def test_products_of_keys(monkeypatch, dim):
    from lla.kernels.mosaic_gpu import inverse, tile

    monkeypatch.setattr(inverse, "lax", types.SimpleNamespace(fori_loop=loop))
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 3, dim, 2 * ROWS)).astype(np.float32)
    shape = (2, 3, inverse.num_sums(dim), 2 * ROWS)
    parts = {name: np.full(shape, np.nan, jnp.bfloat16) for name in ("high", "low")}
    memories = {name: Memory(part) for name, part in parts.items()}
    here = slice(ROWS, 2 * ROWS)
    inverse._write_products(
        tile.Arithmetic(interpreted=True), dim, Memory(keys), memories, (1, 2), here
    )
    high, low = (part.astype(np.float64) for part in parts.values())
    assert np.isnan(high[0]).all() and np.isnan(low[1, :2]).all()
    assert np.isnan(high[1, 2, :, :ROWS]).all()
    key = keys[1, 2, :, here].astype(np.float64)
    a, b = np.tril_indices(dim)
    want = np.concatenate([key[a] * key[b], key, np.ones((1, ROWS))])
    high, low = (part[1, 2, :, here] for part in (high, low))
    assert not high[len(want) :].any() and not low[len(want) :].any()
    error = (high + low)[: len(want)] - want
    assert np.abs(error / np.maximum(1, np.abs(want))).max() < 2.0**-15
    assert np.abs(high[: len(want)] - want).max() > 2.0**-10  # one part would not do


@pytest.mark.parametrize(("sequences", "count"), [(6, 6), (5, 3), (2.5, 2), (0.1, 1)])
def test_as_many_sequences_at_a_time_as_fit(monkeypatch, sequences, count):
    from lla.kernels.mosaic_gpu import launch
    from lla.ops.mosaic_gpu import hopper as mosaic_gpu

    shape = launch.Shape(6, ROWS, ROWS, 2, 1, 32, jnp.dtype(jnp.bfloat16))
    each = mosaic_gpu._inverse_bytes(20, 2 * ROWS)
    monkeypatch.setattr(mosaic_gpu, "_INVERSE_BYTES", int(sequences * each))
    seen = []

    def function(shape, array, pair):
        seen.append((shape.batch, array.shape))
        return {"array": 2 * array, "none": None, "pair": pair[0] + pair[1]}

    array = jnp.arange(12.0).reshape(6, 2)
    spec = types.SimpleNamespace(shape=shape, direct=20)
    found = mosaic_gpu._by_sequences(spec, function, array, (array, array))
    assert seen == [(count, (count, 2))]
    assert found["none"] is None
    assert (found["array"] == 2 * array).all() and (found["pair"] == 2 * array).all()
