"""Independent NumPy evaluations of the operator, in float64 and one row at a time."""

from __future__ import annotations

import numpy as np


def visible(
    shape,
    *,
    is_causal=True,
    query_offset=None,
    key_value_seq_lengths=None,
    segment_ids=None,
    local_window_size=None,
    mask=None,
) -> np.ndarray:
    """The mask of a call by its written definition, pair by pair: bool ``[*B, N, T, S]``."""
    queries, keys = shape.num_queries, shape.key[-3]
    out = np.zeros((*shape.batch, shape.heads, queries, keys), bool)
    dense = np.broadcast_to(True if mask is None else mask, out.shape)
    offsets = np.broadcast_to(0 if query_offset is None else query_offset, shape.batch)
    lengths = np.broadcast_to(
        keys if key_value_seq_lengths is None else key_value_seq_lengths, shape.batch
    )
    for b in np.ndindex(*shape.batch):
        for i in range(queries):
            position = i + offsets[b]
            for j in range(keys):
                seen = j < lengths[b]
                if is_causal:
                    seen = seen and j <= position
                if local_window_size is not None:
                    pair = local_window_size
                    left, right = (pair, pair) if isinstance(pair, int) else pair
                    seen = seen and position - left <= j <= position + right
                if segment_ids is not None:
                    seen = seen and segment_ids[0][b][i] == segment_ids[1][b][j]
                if seen:
                    out[(*b, slice(None), i, j)] = dense[(*b, slice(None), i, j)]
    return out


def _for_rows(row, inputs, valid) -> np.ndarray:
    """Applies `row(q, k, v, ridge, scale)` to every query with the keys that it sees."""
    query, key, value = (np.asarray(inputs[n], np.float64) for n in ("query", "key", "value"))
    *batch, queries, heads, _ = query.shape
    group = heads // key.shape[-2]
    out = np.zeros((*batch, queries, heads, value.shape[-1]))
    for b in np.ndindex(*batch):
        for i in range(queries):
            for n in range(heads):
                seen = valid[(*b, n, i)]
                if seen.any():
                    out[(*b, i, n)] = row(
                        query[(*b, i, n)], key[(*b, seen, n // group)],
                        value[(*b, seen, n // group)], inputs["ridge"][(*b, i, n)],
                        inputs["scale"][(*b, i, n)],
                    )  # fmt: skip
    return out


def _weights(q, k, scale):
    logits = scale * (k @ q)
    return np.exp(logits - logits.max())


def weighted_least_squares(inputs, valid) -> np.ndarray:
    """The intercept of the regression that defines the operator, by `numpy.linalg.lstsq`.

    Minimises ``sum_j w_j |v_j - b - W (k_j - q)|^2 + ridge (sum_j w_j) |W|^2``: the ridge enters as
    rows of a larger ordinary least-squares problem, so no normal equations are formed.
    """

    def row(q, k, v, ridge, scale):
        w, d = _weights(q, k, scale), q.size
        design = np.sqrt(w)[:, None] * np.column_stack([np.ones(len(k)), k - q])
        penalty = np.sqrt(ridge * w.sum()) * np.column_stack([np.zeros(d), np.eye(d)])
        target = np.concatenate([np.sqrt(w)[:, None] * v, np.zeros((d, v.shape[1]))])
        return np.linalg.lstsq(np.concatenate([design, penalty]), target, rcond=None)[0][0]

    return _for_rows(row, inputs, valid)


def published_form(inputs, valid) -> np.ndarray:
    """The paper's closed form with ``omega, mu, Sigma, rho`` (arXiv 2510.01450), uncentred."""

    def row(q, k, v, ridge, scale):
        w, z = _weights(q, k, scale), k - q
        omega, mu = w.sum(), w @ z
        sigma = (w[:, None] * z).T @ z + ridge * omega * np.eye(q.size)
        rho = np.linalg.solve(sigma, mu)
        return (w * (1 - z @ rho) / (omega - mu @ rho)) @ v

    return _for_rows(row, inputs, valid)


def ridge_regression(inputs, valid) -> np.ndarray:
    """Unweighted ridge regression with an intercept on the visible keys, evaluated at the query.

    What the operator becomes for scale 0; ``min mean_j |v_j - a - W k_j|^2 + ridge |W|^2``.
    """

    def row(q, k, v, ridge, scale):
        del scale
        centred, target = k - k.mean(0), v - v.mean(0)
        gram = centred.T @ centred + ridge * len(k) * np.eye(q.size)
        return v.mean(0) + (q - k.mean(0)) @ np.linalg.solve(gram, centred.T @ target)

    return _for_rows(row, inputs, valid)
