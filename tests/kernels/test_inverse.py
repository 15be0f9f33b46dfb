"""What the direct solver of the Hopper kernels sums, and its inverses, without the kernels."""

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
    """An array of rows with the part of a reference's interface that the inversion uses."""

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


def invert(monkeypatch, sums, ridge, dim):
    """The inverses ``[rows, dim, 32]`` that the kernel writes, and what it leaves unwritten."""
    from lla.kernels.mosaic_gpu import inverse, launch, tile

    def loop(low, high, body, carry):
        for i in range(low, high):
            carry = body(i, carry)
        return carry

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
    """What the first kernel sums, ``[F, rows]``, for ``keys [n, dim]``, ``weights [rows, n]``."""
    from lla.kernels.mosaic_gpu import inverse

    found = np.zeros((ROWS, inverse.num_sums(dim)))
    a, b = np.tril_indices(dim)
    found[:, : len(a)] = weights @ (keys[:, a] * keys[:, b])
    found[:, len(a) : len(a) + dim] = weights @ keys
    found[:, len(a) + dim] = weights.sum(1)
    return found.T.astype(np.float32)


def systems(keys, weights, ridge):
    """In float64."""
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
def test_a_system_that_rounding_spoils_has_no_inverse(monkeypatch, dim, scale):
    # Keys on a line far away: the covariances are differences of numbers near scale^2, whose
    # rounding is far above the ridge; but not in every row.
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
    # What is left is of use as it is.
    assert np.linalg.eigvalsh(found[~none].astype(np.float64)).min() > 0


def test_what_is_served_directly_is_what_can_be_inverted():
    from lla.kernels.mosaic_gpu import configs, inverse
    from lla.ops import mosaic_gpu

    assert mosaic_gpu._MAX_DIRECT_DIM == configs.DIRECT_DIM == inverse.system_dim(17)
    assert configs.choose(configs.DIRECT_DIM).solve_direct is not None


def test_products_of_keys():
    from lla.kernels.mosaic_gpu import inverse

    rng = np.random.default_rng(0)
    key = jnp.asarray(rng.standard_normal((2, 40, 3, 32)) + 5, jnp.bfloat16)
    key = key.at[..., 20:].set(0)  # of 20 dimensions, padded
    key = key.at[0, 30].set(jnp.nan)
    length = jnp.asarray([40, 25])
    high, low = jax.jit(inverse.products, static_argnums=2)(key, length, 32)
    assert high.dtype == low.dtype == jnp.bfloat16
    assert high.shape == low.shape == (2, 3, inverse.num_sums(32), 40) == (2, 3, 576, 40)
    high, low = (np.moveaxis(np.asarray(part, np.float64), -1, 1) for part in (high, low))
    exact = np.asarray(key, np.float64)
    a, b = np.tril_indices(32)
    for sequence in range(2):
        there = [j for j in range(int(length[sequence])) if (sequence, j) != (0, 30)]
        keys = exact[sequence] - exact[sequence, there].mean(0)
        want = np.concatenate([keys[..., a] * keys[..., b], keys, np.ones((40, 3, 1))], -1)
        found = high[sequence] + low[sequence]
        assert (found[..., want.shape[-1] :] == 0).all()
        found = found[..., : want.shape[-1]]
        error = np.abs(found - want)[there] / np.maximum(1, np.abs(want[there]))
        assert error.max() < 2.0**-15
        coarse = np.abs(high[sequence][..., : want.shape[-1]] - want)[there]
        assert coarse.max() > 2.0**-10  # the second part is needed, and not optimised away
