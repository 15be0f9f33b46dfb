"""Values against declared types: what fits, what it becomes, and how a mistake is called."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest

from lla.typed import check_range, conform, describe


@pytest.mark.parametrize(
    "value, declared, expected",
    [
        (3, int, 3),
        (np.int32(3), int, 3),
        (3, float, 3.0),
        (np.float32(0.5), float, 0.5),
        (True, bool, True),
        ("a", str, "a"),
        (None, int | None, None),
        (3, int | None, 3),
        (3, float | int, 3),
        ([1, 2], tuple[int, ...], (1, 2)),
        ((), tuple[int, ...], ()),
        ([1, 2], int | tuple[int, ...], (1, 2)),
        (("sine", 1, (0, 2)), tuple[str, int, tuple[float, float]], ("sine", 1, (0.0, 2.0))),
        ("b", Literal["a", "b"], "b"),
        ({"a": 1}, dict[str, Any], {"a": 1}),
        ({"a": 1}, Mapping[str, int], {"a": 1}),
        (object, Any, object),
    ],
)
def test_what_fits_becomes_the_declared_type(value, declared, expected):
    found = conform(value, declared, "x")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "value, declared, message",
    [
        ("abc", float | None, "x must be a finite number or None, got 'abc'"),
        ((1, 2), float | None, r"x must be a finite number or None, got \(1, 2\)"),
        (3.0, int, "x must be an integer, got 3.0"),
        (True, int, "x must be an integer, got True"),
        (True, float, "x must be a finite number, got True"),
        (1, bool, "x must be True or False, got 1"),
        (float("nan"), float, "x must be a finite number, got nan"),
        (float("-inf"), float, "x must be a finite number, got -inf"),
        (10**400, float, "x must be a finite number, got 1000"),
        (3, str, "x must be a string, got 3"),
        (None, int, "x must be an integer, got None"),
        ((1.5,), tuple[int, ...], r"x must be a tuple of integers, got \(1.5,\)"),
        (3, tuple[int, ...], "x must be a tuple of integers, got 3"),
        ((1, 2, 3), tuple[int, int], r"x must be a tuple \(an integer, an integer\), got"),
        (3.5, int | tuple[int, int] | None, "an integer, a tuple .* or None, got 3.5"),
        ("c", Literal["a", "b"], "x must be 'a' or 'b', got 'c'"),
        (True, Literal[1, 2], "x must be 1 or 2, got True"),
        (3, dict[str, Any], "x must be a section of names and values, got 3"),
    ],
)
def test_what_does_not_fit_is_named(value, declared, message):
    with pytest.raises(ValueError, match=message):
        conform(value, declared, "x")


def test_types_in_words():
    assert describe(None) == "None"
    assert describe(tuple) == "a tuple"
    assert describe(tuple[tuple[str, float], ...]) == (
        "a tuple, each entry a tuple (a string, a finite number)"
    )


def test_ranges_name_the_number():
    check_range(1, 3, a=1, b=(2, 3), c=())
    with pytest.raises(ValueError, match=r"b must be >= 1 and <= 3, got \(2, 4\)"):
        check_range(1, 3, a=1, b=(2, 4))
    with pytest.raises(ValueError, match="a must be >= 1, got 0"):
        check_range(1, a=0)
    with pytest.raises(ValueError, match="a must be >= 1, got nan"):
        check_range(1, a=float("nan"))
