"""Argument checks shared by the estimators."""

import jax
import jax.numpy as jnp


def check_sequences(queries: jax.Array, keys: jax.Array, values: jax.Array) -> None:
    """Raises ValueError unless shapes are [B, T, H], [B, T, H], [B, T, Hv] and dtypes agree."""
    if queries.ndim != 3 or keys.ndim != 3 or values.ndim != 3:
        raise ValueError(
            "queries, keys and values must be [batch, length, dim]; "
            f"got {queries.shape}, {keys.shape}, {values.shape}."
        )
    if queries.shape != keys.shape:
        raise ValueError(
            f"queries {queries.shape} and keys {keys.shape} must have the same shape: "
            "one query for each pair."
        )
    if keys.shape[:2] != values.shape[:2]:
        raise ValueError(
            f"keys {keys.shape} and values {values.shape} must agree in [batch, length]."
        )
    if not (queries.dtype == keys.dtype == values.dtype) or not jnp.issubdtype(
        queries.dtype, jnp.floating
    ):
        raise ValueError(
            "queries, keys and values must share one floating dtype; "
            f"got {queries.dtype}, {keys.dtype}, {values.dtype}."
        )


def known(number) -> bool:
    """False for traced options, which cannot be checked."""
    return not isinstance(number, jax.core.Tracer)


def check_positive(**given: float) -> None:
    """Raises ValueError naming the first option that is known not to be > 0."""
    for name, number in given.items():
        if known(number) and not number > 0:
            raise ValueError(f"{name} must be > 0; got {number}.")


def check_decay(decay: float) -> None:
    """Raises ValueError unless 0 < decay <= 1; a traced value passes."""
    if known(decay) and not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1]; got {decay}.")


def check_form(form: str) -> None:
    """Raises ValueError unless `form` is one of the two ways to compute a recurrence."""
    if form not in ("chunked", "recurrent"):
        raise ValueError(f"form must be 'chunked' or 'recurrent'; got {form!r}.")
