"""Bad input, dispatch between implementations, and `explain`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lla

pytestmark = pytest.mark.compat

B, T, S, N, K, H = 2, 6, 7, 4, 2, 8
QUERY, KEY, VALUE = (
    jnp.ones(shape, jnp.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, 5))
)
NAMES = ("reference", "xla", "mosaic_gpu", "mosaic_tpu")


def call(query=QUERY, key=KEY, value=VALUE, **options):
    """Traces without computing."""
    options.setdefault("ridge", 1.0)
    return jax.eval_shape(
        lambda q, k, v: lla.local_linear_attention(q, k, v, **options), query, key, value
    )


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


ints = np.int32
BAD = {
    # what is wrong: (arguments, what the message must name)
    "query rank": ({"query": zeros(T, H)}, "query must have shape.*(6, 8)"),
    "key rank": ({"key": zeros(S, H)}, "key must have shape.*(7, 8)"),
    "integer query": ({"query": zeros(B, T, N, H, dtype=ints)}, "query must be one of.*int32"),
    "mixed dtypes": (
        {"value": zeros(B, S, K, 5, dtype=jnp.bfloat16)},
        "share one dtype.*float32, float32, bfloat16",
    ),
    "leading axes": ({"query": zeros(3, T, N, H)}, "leading axes.*(3, 6, 4, 8).*(2, 7, 2, 8)"),
    "value leading axes": ({"value": zeros(3, S, K, H)}, "leading axes.*(3, 7, 2, 8)"),
    "head_dim": ({"key": zeros(B, S, K, 9)}, "equal head_dim.*(2, 7, 2, 9)"),
    "key and value length": ({"value": zeros(B, 5, K, H)}, "key and value.*(2, 5, 2, 8)"),
    "key and value heads": ({"value": zeros(B, S, 1, H)}, "key and value.*(2, 7, 1, 8)"),
    "grouping": ({"query": zeros(B, T, 3, H)}, "query heads (3) must be a multiple.*(2)"),
    "no query": ({"query": zeros(B, 0, N, H)}, "may be empty.*(2, 0, 4, 8)"),
    "no key": ({"key": zeros(B, 0, K, H), "value": zeros(B, 0, K, H)}, "may be empty"),
    "no ridge": ({"ridge": None}, "ridge is required"),
    "ridge 0": ({"ridge": 0.0}, "ridge must be positive"),
    "ridge shape": ({"ridge": np.ones((5,), np.float32)}, "ridge must be broadcastable.*(5,)"),
    "ridge type": ({"ridge": "large"}, "ridge must be a float.*'large'"),
    "scale shape": ({"scale": np.ones((3, 1), np.float32)}, "scale must be broadcastable.*(3, 1)"),
    "negative scale": ({"scale": -0.1}, "scale must be non-negative"),
    "scale NaN": ({"scale": float("nan")}, "scale must be non-negative and finite"),
    "offset shape": ({"query_offset": np.ones(3, ints)}, "query_offset must be broad.*(2,).*(3,)"),
    "offset type": ({"query_offset": 1.5}, "query_offset must be an integer"),
    "lengths shape": (
        {"key_value_seq_lengths": np.ones(3, ints)},
        "key_value_seq_lengths must be broad.*(2,).*(3,)",
    ),
    "lengths type": ({"key_value_seq_lengths": 2.0}, "key_value_seq_lengths must be an integer"),
    "one segment array": ({"segment_ids": np.ones((B, T), ints)}, "segment_ids must be a pair"),
    "query segments": (
        {"segment_ids": (np.ones((B, S), ints), np.ones((B, S), ints))},
        "query part of segment_ids must have shape (2, 6), got (2, 7)",
    ),
    "key segments": (
        {"segment_ids": (np.ones((B, T), ints), np.ones((B, T), ints))},
        "key part of segment_ids must have shape (2, 7), got (2, 6)",
    ),
    "segment type": (
        {"segment_ids": (np.ones((B, T)), np.ones((B, S), ints))},
        "segment_ids (query) must be an integer array",
    ),
    "negative window": ({"local_window_size": -1}, "local_window_size must be.*-1"),
    "window triple": ({"local_window_size": (1, 2, 3)}, "local_window_size must be.*(1, 2, 3)"),
    "float window": ({"local_window_size": (1.5, 2)}, "local_window_size must be.*(1.5, 2)"),
    "mask type": ({"mask": np.ones((T, S), np.float32)}, "mask must be boolean, got float32"),
    "mask shape": ({"mask": np.ones((S, T), bool)}, "mask must be broad.*(2, 4, 6, 7).*(7, 6)"),
    "mask rank": ({"mask": np.ones((1, B, N, T, S), bool)}, "mask must be.*(1, 2, 4, 6, 7)"),
    "bias shape": ({"bias": zeros(S, T)}, "bias must be broad.*(2, 4, 6, 7).*(7, 6)"),
    "bias heads": ({"bias": zeros(K, T, S)}, "bias must be broad.*(2, 4, 6, 7).*(2, 6, 7)"),
    "bias rank": ({"bias": zeros(1, B, N, T, S)}, "bias must be.*(1, 2, 4, 6, 7)"),
    "integer bias": ({"bias": zeros(T, S, dtype=ints)}, "bias must be one of.*int32.*(6, 7)"),
    "boolean bias": ({"bias": zeros(T, S, dtype=bool)}, "bias must be one of.*bool.*(6, 7)"),
    "complex bias": (
        {"bias": zeros(T, S, dtype=jnp.complex64)},
        "bias must be one of.*complex64.*(6, 7)",
    ),
    "soft cap": ({"logits_soft_cap": 5.0}, "logits_soft_cap is defined for softmax"),
    "query lengths shape": (
        {"query_seq_lengths": np.ones(3, ints)},
        "query_seq_lengths must be broad.*(2,).*(3,)",
    ),
    "query lengths type": ({"query_seq_lengths": 2.0}, "query_seq_lengths must be an integer"),
    "solver type": ({"solver": "cg"}, "solver must be an lla.Solver or None, got str"),
    "implementation": ({"implementation": "cuda"}, "implementation must be.*'cuda'"),
    "empty sequence": ({"implementation": ()}, "implementation must be.*()"),
    "unknown in sequence": ({"implementation": ("xla", "cuda")}, "implementation must be.*cuda"),
}


def pattern(message: str) -> str:
    """Parts joined by ``.*`` in any text between, everything else literal."""
    return ".*".join(re.escape(part) for part in message.split(".*"))


@pytest.mark.parametrize("case", BAD)
def test_bad_argument(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=pattern(message)):
        call(**arguments)


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (None, "probe is required"),
        (zeros(B, T, K, H), "probe must have query's shape.*(2, 6, 2, 8)"),
        (zeros(B, T, N, H, dtype=jnp.bfloat16), "probe must have query's shape and dtype.*bfloat"),
    ],
)
def test_bad_probe(probe, message):
    with pytest.raises(ValueError, match=pattern(message)):
        lla.parallax_attention(QUERY, probe, KEY, VALUE)


def test_traced_integer_ridge():
    with pytest.raises(ValueError, match="ridge must be a float"):
        jax.eval_shape(lambda r: call(ridge=r), jnp.int32(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lu"}, "Solver.method must be.*'lu'"),
        ({"tol": 0.0}, "Solver.tol must lie.*0.0"),
        ({"tol": 1.0}, "Solver.tol must lie.*1.0"),
        ({"tol": float("nan")}, "Solver.tol must lie.*nan"),
        ({"backward_tol": -1e-3}, "Solver.backward_tol must lie.*-0.001"),
        ({"max_iters": 0}, "Solver.max_iters must be a positive int, got 0"),
        ({"max_iters": 2.5}, "Solver.max_iters must be a positive int, got 2.5"),
        ({"num_iters": -1}, "Solver.num_iters must be a positive int, got -1"),
        ({"num_iters": 3, "tol": 1e-3}, "cannot be combined with tol"),
        ({"num_iters": 3, "max_iters": 3}, "cannot be combined with tol"),
    ],
)
def test_bad_solver(options, message):
    with pytest.raises(ValueError, match=pattern(message)):
        lla.Solver(**options)


def test_valid_corner_values_are_accepted():
    """Neighbours of the errors above."""
    assert call(scale=0.0).shape == (B, T, N, 5)
    assert call(local_window_size=0).shape == (B, T, N, 5)
    assert call(query_offset=-100).shape == (B, T, N, 5)
    assert call(ridge=np.ones((N,), np.float32)).shape == (B, T, N, 5)
    assert call(mask=np.ones((1, 1), bool)).shape == (B, T, N, 5)
    assert call(implementation=["reference"]).shape == (B, T, N, 5)


@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
def test_named_kernel_says_why_it_cannot_serve(name):
    with pytest.raises(NotImplementedError, match=f"{name}: .+"):
        call(implementation=name)


def test_sequence_falls_through():
    """The first that can serve does: its statistics show which one it was."""
    options = {"ridge": 1.0, "return_stats": True}

    def iterations(implementation):
        _, stats = lla.local_linear_attention(
            QUERY * 0.1, KEY, VALUE, implementation=implementation, **options
        )
        return int(stats.iterations.max())

    assert iterations(("mosaic_gpu", "reference", "xla")) == 0
    assert iterations(("mosaic_tpu", "xla", "reference")) > 0


def test_exhausted_sequence_lists_every_reason():
    with pytest.raises(NotImplementedError) as error:
        call(
            implementation=("mosaic_gpu", "reference", "mosaic_tpu"),
            solver=lla.Solver(num_iters=3),
        )
    for part in ("mosaic_gpu: ", "mosaic_tpu: ", "reference: ", "num_iters"):
        assert part in str(error.value)


def test_default_never_fails_for_want_of_a_kernel():
    assert call(implementation=None).dtype == jnp.float32
    assert call(implementation=None, solver=lla.Solver(num_iters=3)).dtype == jnp.float32


def test_explain_gives_reasons_without_arrays():
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (QUERY, KEY, VALUE)]
    reasons = lla.explain(*shapes, solver=lla.Solver(num_iters=3))
    assert tuple(reasons) == NAMES
    assert reasons["xla"] is None
    assert "num_iters" in reasons["reference"]
    assert "kernel" in reasons["mosaic_gpu"]
    assert lla.explain(*shapes, implementation="reference") == {"reference": None}
    assert lla.explain(QUERY, KEY, VALUE)["reference"] is None


def test_explain_checks_its_arguments():
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (QUERY, KEY, VALUE)]
    with pytest.raises(ValueError, match="implementation"):
        lla.explain(*shapes, implementation="cuda")
    with pytest.raises(ValueError, match="equal head_dim"):
        lla.explain(shapes[0], jax.ShapeDtypeStruct((B, S, K, 9), jnp.float32), shapes[2])
