"""Exact bias of kernel-weighted fits to infinitely many keys, uniform on [0, 1]^d.

Weights are Gaussian in the distance between query and key. All integrals are Gauss-Legendre sums in
float64: over the keys within 9 bandwidths of a query, and over queries on panels that resolve the
layers at the boundary. NumPy alone, independent of the library.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

FITS = ("constant", "linear")

Function = Callable[[np.ndarray], np.ndarray]

_REACH = 9.0  # in bandwidths: exp(-9^2 / 2) = 3e-18
_LAYER = 7.0  # the bias at an end falls like exp(-u^2 / 2) with the distance u in bandwidths
_KEYS = np.polynomial.legendre.leggauss(96)
_PANEL = np.polynomial.legendre.leggauss(8)


@dataclasses.dataclass(frozen=True)
class Target:
    """A function on [0, 1] with its first two derivatives; in d dimensions, the product of d."""

    value: Function
    slope: Function
    curvature: Function


TARGETS = {
    "sine": Target(
        lambda x: np.sin(4 * x + 1),
        lambda x: 4 * np.cos(4 * x + 1),
        lambda x: -16 * np.sin(4 * x + 1),
    ),
    "exponential": Target(
        lambda x: np.exp(2 * x),
        lambda x: 2 * np.exp(2 * x),
        lambda x: 4 * np.exp(2 * x),
    ),
    "rational": Target(
        lambda x: 1 / (1 + 2 * x),
        lambda x: -2 / (1 + 2 * x) ** 2,
        lambda x: 8 / (1 + 2 * x) ** 3,
    ),
    # The control: no slope at the boundary, so no bias of first order there.
    "flat_ends": Target(
        lambda x: np.cos(2 * np.pi * x),
        lambda x: -2 * np.pi * np.sin(2 * np.pi * x),
        lambda x: -4 * np.pi**2 * np.cos(2 * np.pi * x),
    ),
}


def query_rule(bandwidth: float) -> tuple[np.ndarray, np.ndarray]:
    """Points of [0, 1] and weights: panels of one bandwidth near the ends, at most 0.1 inside."""
    near = np.arange(0.0, min(_LAYER * bandwidth, 0.5), bandwidth)
    inside = np.linspace(near[-1], 0.5, 2 + math.ceil((0.5 - near[-1]) / 0.1))[1:]
    half = np.concatenate([near, inside])
    return _panels(np.concatenate([half, 1 - half[-2::-1]]))


def flat_biases(
    target: Target, query: np.ndarray, bandwidth: float, ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    """Biases [T] of the local-constant and the local-linear fit in one dimension."""
    offset, weights = _keys(query, bandwidth)
    mean = (weights * offset).sum(axis=1, keepdims=True)
    centred = offset - mean
    variance = (weights * centred**2).sum(axis=1, keepdims=True)
    linear = weights * (1 - centred * mean / (variance + ridge))
    return _errors(target, query, offset, weights, linear)


def arc_biases(
    target: Target, query: np.ndarray, bandwidth: float, radius: float, ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    """The same for keys in the plane, uniform on an arc of length 1 of a circle.

    The target is a function of the length along the arc; the fit is linear in both coordinates of
    the plane, as local linear attention's is.
    """
    offset, weights = _keys(query, bandwidth, lambda x: 2 * radius * np.sin(x / (2 * radius)))
    # Coordinates along the tangent and the normal at the query. The ridge has no direction.
    tangent = radius * np.sin(offset / radius)
    normal = -2 * radius * np.sin(offset / (2 * radius)) ** 2
    plane = np.stack([tangent, normal], axis=-1)
    mean = np.einsum("tk,tki->ti", weights, plane)
    centred = plane - mean[:, None, :]
    covariance = np.einsum("tk,tki,tkj->tij", weights, centred, centred)
    probe = np.linalg.solve(covariance + ridge * np.eye(2), mean[:, :, None])
    linear = weights * (1 - (centred @ probe)[:, :, 0])
    return _errors(target, query, offset, weights, linear)


def squared_bias(
    target: Target, dim: int, bandwidth: float, ridge: float = 0.0
) -> dict[str, dict[str, float]]:
    """For each fit, the squared bias integrated over [0, 1]^dim and the one at the corner 0.

    Product weights, a product of intervals and a product target need no grid of keys: with the
    values c and l of the one-dimensional fits, the local-constant fit in d dimensions is the
    product of the c, and the local-linear one is sum_a l_a prod_{b != a} c_b - (d - 1) prod_a c_a.
    """
    query, measure = query_rule(bandwidth)
    inside = _product_biases(target, dim, query, bandwidth, ridge)
    total = dict.fromkeys(FITS, 0.0)
    rest = _outer([measure] * (dim - 1))
    for weight, *biases in zip(measure, *inside, strict=True):
        for fit, bias in zip(FITS, biases, strict=True):
            total[fit] += float(weight * np.sum(rest * bias**2))
    corner = _product_biases(target, dim, np.zeros(1), bandwidth, ridge)
    at = {fit: float(next(bias)[0] ** 2) for fit, bias in zip(FITS, corner, strict=True)}
    return {fit: {"integrated": total[fit], "boundary": at[fit]} for fit in FITS}


def leading_terms(target: Target, bandwidth: float) -> dict[str, dict[str, float]]:
    """`squared_bias` for small bandwidths by theory, in one dimension and without a ridge.

    Local constant: the bias at a distance u of bandwidths from an end is b f' phi(u) / Phi(u), with
    the normal density and distribution. Local linear: inside b^2 f'' / 2; at the end b^2 f'' / 2
    times (s2^2 - s1 s3) / (s0 s2 - s1^2) with the moments s of half a normal density.
    """
    ends = np.array([0.0, 1.0])
    slope = target.slope(ends)
    query, measure = query_rule(0.02)
    curvature = measure @ target.curvature(query) ** 2
    u, width = _panels(np.linspace(0, 12, 49))
    distribution = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in u])
    layer = width @ (np.exp(-(u**2)) / (2 * math.pi) / distribution**2)
    factor = (math.pi - 4) / (math.pi - 2) / 2
    return {
        "constant": {
            "integrated": float(bandwidth**3 * layer * (slope @ slope)),
            "boundary": float(bandwidth**2 * 2 / math.pi * slope[0] ** 2),
        },
        "linear": {
            "integrated": float(bandwidth**4 * curvature / 4),
            "boundary": float((bandwidth**2 * factor * target.curvature(ends)[0]) ** 2),
        },
    }


def exponent(bandwidths: np.ndarray, amounts: np.ndarray) -> float:
    """Least-squares slope of log amount against log bandwidth."""
    return float(np.polyfit(np.log(bandwidths), np.log(amounts), 1)[0])


def _panels(edges):
    """Gauss-Legendre points and weights on the panels between increasing `edges`."""
    node, weight = _PANEL
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (1 + node)).ravel(), (half * weight).ravel()


def _keys(query, bandwidth, distance=lambda x: x):
    """Offsets of the keys from each query along the line, and their normalised weights: [T, K]."""
    low = np.maximum(-query, -_REACH * bandwidth)[:, None]
    high = np.minimum(1 - query, _REACH * bandwidth)[:, None]
    node, weight = _KEYS
    offset = low + (high - low) / 2 * (1 + node)
    weights = weight * np.exp(-((distance(offset) / bandwidth) ** 2) / 2)
    return offset, weights / weights.sum(axis=1, keepdims=True)


def _errors(target, query, offset, constant, linear):
    # Both weights sum to one, so that differences to the value at the query give a small bias well.
    difference = target.value(query[:, None] + offset) - target.value(query)[:, None]
    return (constant * difference).sum(axis=1), (linear * difference).sum(axis=1)


def _product_biases(target, dim, query, bandwidth, ridge):
    """Two generators over the first coordinate of biases [T^(dim-1)]."""
    exact = target.value(query)
    constant, linear = (exact + b for b in flat_biases(target, query, bandwidth, ridge))
    product, true = _outer([constant] * (dim - 1)), _outer([exact] * (dim - 1))
    mixed = np.zeros(1)
    for axis in range(dim - 1):
        before = _outer([constant] * axis)
        mixed = (np.outer(mixed, constant) + np.outer(before, linear)).ravel()
    first = ((c * product - f * true) for c, f in zip(constant, exact, strict=True))
    second = (
        c * mixed + (each - (dim - 1) * c) * product - f * true
        for c, each, f in zip(constant, linear, exact, strict=True)
    )
    return first, second


def _outer(factors):
    product = np.ones(1)
    for factor in factors:
        product = np.outer(product, factor).ravel()
    return product
