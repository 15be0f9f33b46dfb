"""What tests of every part measure."""

import numpy as np


def relative_error(actual, expected) -> float:
    """Frobenius norm of the difference over that of `expected`, or over 1 where that is zero."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert np.isfinite(actual).all()
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(actual - expected) / (norm if norm > 0 else 1))
