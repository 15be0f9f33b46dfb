"""The one table of styles: colours that stay apart, looks that differ, names and their order."""

import itertools

import numpy as np
import pytest

from lla import estimators, mixers
from lla.runs import styles

# Linear RGB of what is seen, from linear RGB (Machado et al., 2009, severity 1).
VISION = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]
MECHANISMS = (
    "lla", "parallax", "softmax", "mesanet", "deltanet", "gated_deltanet", "linear", "gla", "mamba",
    "mamba2", "hyena",
)  # fmt: skip


def lab(colour, vision):
    """CIE L*a*b* of a hexadecimal colour, as seen."""
    srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    xyz = np.array(TO_XYZ) @ seen / [0.95047, 1, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_colours_of_mechanisms_stay_apart(vision):
    seen = {name: lab(styles.style(name).colour, vision) for name in MECHANISMS}
    distances = {
        pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]])
        for pair in itertools.combinations(MECHANISMS, 2)
    }
    closest = min(distances, key=distances.get)
    assert distances[closest] > 14, (closest, distances[closest])
    assert all(value[0] < 78 for value in seen.values())  # not lost on white


def test_every_mechanism_and_estimator_has_a_style():
    assert set(mixers.names()) <= set(styles.STYLES)
    assert {"retnet", *MECHANISMS} == set(mixers.names())
    assert set(estimators.names()) <= set(styles.STYLES)


def test_looks_differ_and_variants_keep_their_colour():
    normed = ("lla", "parallax", "softmax", "linear")  # those with an option for it
    everything = [
        styles.style(name, taps, norm)
        for name in mixers.names()
        for taps in (0, 4)
        for norm in ((False, True) if name in normed else (None,))
    ]
    looks = [(s.colour, s.marker, s.line, s.filled) for s in everything]
    assert len(set(looks)) == len(looks) == len({s.name for s in everything})
    pairs = (("lla_cg", "lla"), ("lla_direct", "lla"), ("mesanet_decay", "mesanet"))
    for one, other in (*pairs, ("jax_softmax", "softmax"), ("cudnn", "softmax")):
        assert styles.style(one).colour == styles.style(other).colour


def test_short_convolutions():
    plain = styles.style("gated_deltanet")
    assert styles.style("gated_deltanet", 4) == styles.style("gated_deltanet", None) == plain
    without = styles.style("gated_deltanet", 0)
    assert without.name == "Gated DeltaNet, no conv." and not without.filled
    assert (without.colour, without.marker) == (plain.colour, plain.marker)
    assert without.line != plain.line
    assert styles.style("softmax", 0).name == "Softmax"
    assert styles.style("softmax", 3).name == "Softmax, conv."


def test_normalised_queries_and_keys():
    assert styles.style("softmax", qk_norm=False) == styles.style("softmax")
    assert styles.style("lla", qk_norm=True) == styles.style("lla")
    normed = styles.style("softmax", qk_norm=True)
    assert normed.name == "Softmax, QK-norm" and not normed.filled and normed.line == "--"
    assert styles.style("lla", qk_norm=False).name == "LLA, no QK-norm"
    both = styles.style("softmax", 4, True)
    assert both.name == "Softmax, conv., QK-norm" and both.line == "-."
    assert styles.rank_of_name(both.name) == styles.rank_of_name("Softmax")


def test_order():
    assert styles.ordered(["hyena", "?", "softmax", "lla", "hyena"]) == [
        "lla", "softmax", "hyena", "?"
    ]  # fmt: skip
    ranks = [styles.rank_of_name(n) for n in ("LLA", "LLA, CG", "Softmax", "Mamba, no conv.", "?")]
    assert ranks == sorted(ranks) and ranks[-2] == styles.rank_of_name("Mamba") < ranks[-1]


def test_a_series_that_is_unknown_is_grey():
    assert styles.style("something").name == "something"
    assert styles.style("something").colour not in {s.colour for s in styles.STYLES.values()}
