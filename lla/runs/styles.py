"""The style of every series in all figures: name, colour, marker, line, and the order.

A colour belongs to one mechanism. Other implementations of a mechanism, and variants with other
options, have the same colour and a marker of their own, open or on a dashed line. The colours
extend Okabe and Ito's palette; `tests/experiments/test_styles.py` checks that those of mechanisms
stay apart under protanopia, deuteranopia and tritanopia.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

# Sizes in points of markers that would look too small or too large at the default of 4.5.
_SIZES = {"*": 7.2, "P": 6.0, "X": 6.0, "<": 5.2, ">": 5.2, "^": 5.2, "v": 5.2, "d": 5.5, "_": 7.0}


@dataclasses.dataclass(frozen=True)
class Style:
    """The style of a series.

    Attributes:
      name: as printed in legends and tables.
      colour: hexadecimal.
      marker, line: as Matplotlib calls them.
      filled: whether the marker is filled with `colour` or white inside.
    """

    name: str
    colour: str
    marker: str
    line: str = "-"
    filled: bool = True

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `Axes.plot` and `Axes.errorbar`."""
        edged = self.filled and self.marker not in "_+x"
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.line,
            "markersize": _SIZES.get(self.marker, 4.5),
            "markerfacecolor": self.colour if self.filled else "white",
            "markeredgecolor": "white" if edged else self.colour,
            "markeredgewidth": 0.4 if edged else 0.8,
        }


_LLA, _SOFTMAX, _MESANET = "#D55E00", "#0072B2", "#009E73"
_LINEAR, _GLA, _GATED_DELTANET = "#BBBBBB", "#7A4B1E", "#882255"

# By their names in configs and result files, in the order of legends and tables.
STYLES = {
    "lla": Style("LLA", _LLA, "o"),
    "lla_cg": Style("LLA, CG", _LLA, "o"),
    "lla_direct": Style("LLA, direct", _LLA, "D", "--", False),
    "lla_10": Style("LLA, ridge 10", _LLA, "D", "--", False),
    "lla_0.1": Style("LLA, ridge 0.1", _LLA, "o"),
    "dense": Style("LLA, dense, n² d", "#000000", "X"),
    "dense_matrices": Style("LLA, dense, n² + n d²", "#777777", "v", "--"),
    "parallax": Style("Parallax", "#E69F00", "v"),
    "softmax": Style("Softmax", _SOFTMAX, "s"),
    "jax_softmax": Style("Softmax, jax.nn", _SOFTMAX, "h", "--", False),
    "cudnn": Style("Softmax, cuDNN", _SOFTMAX, "P", ":", False),
    "mesanet": Style("MesaNet", _MESANET, "^"),
    "mesanet_decay": Style("MesaNet, decay", _MESANET, "^", "--", False),
    "deltanet": Style("DeltaNet", "#CC79A7", "<"),
    "gated_deltanet": Style("Gated DeltaNet", _GATED_DELTANET, ">"),
    "linear": Style("Linear attention", _LINEAR, "D"),
    "linear_attention": Style("Linear attention", _LINEAR, "D"),
    "retnet": Style("RetNet", _LINEAR, "p", "--", False),
    "gla": Style("GLA", _GLA, "P"),
    "gated_linear_attention": Style("GLA, fixed gate", _GLA, "P", "--", False),
    "mamba": Style("Mamba", "#56B4E9", "X"),
    "mamba2": Style("Mamba-2", "#332288", "d"),
    "hyena": Style("Hyena", "#000000", "*"),
    "persistence": Style("Persistence", "#000000", "X"),
    "autoregression": Style("Autoregression", "#56B4E9", "*"),
    # Fits of the bias experiment: with local weights (as LLA and softmax attention) and without.
    "local linear (LLA)": Style("Local linear (LLA)", _LLA, "o"),
    "local constant (softmax)": Style("Local constant (softmax)", _SOFTMAX, "s"),
    "global linear": Style("Global linear", _LLA, "o", "--", False),
    "global constant": Style("Global constant", _SOFTMAX, "s", "--", False),
    "oracle": Style("Oracle (segments known)", "#000000", "_", "--"),
}

# Mechanisms published with short convolutions, and with normalised queries and keys.
CONVOLUTIONAL = ("mesanet", "deltanet", "gated_deltanet", "mamba", "mamba2", "hyena")
NORMALISED = ("lla", "parallax")


def style(name: str, short_conv: int | None = None, qk_norm: bool | None = None) -> Style:
    """The style of a series; a series that is not in `STYLES` is grey and keeps its `name`.

    If an option differs from the published mechanism, the name says so, the marker is open, and the
    line is another one.

    Args:
      name: in configs and result files.
      short_conv, qk_norm: options of the mechanism, None if unknown.
    """
    found = STYLES.get(name, Style(name, "#555555", "8", "-."))
    if short_conv is not None and bool(short_conv) != (name in CONVOLUTIONAL):
        found = _other(found, "conv." if short_conv else "no conv.", ":")
    if qk_norm is not None and qk_norm != (name in NORMALISED):
        found = _other(found, "QK-norm" if qk_norm else "no QK-norm", "--")
    return found


def _other(found, what, line):
    line = line if found.filled else "-."  # two options differ
    return dataclasses.replace(found, name=f"{found.name}, {what}", line=line, filled=False)


def rank(name: str) -> int:
    """The place of a series in legends and tables; series that are not in `STYLES` come last."""
    return list(STYLES).index(name) if name in STYLES else len(STYLES)


def rank_of_name(name: str) -> int:
    """The place of a series by its printed name, with or without additions after a comma."""
    printed = [style.name for style in STYLES.values()]
    while name not in printed and ", " in name:
        name = name.rpartition(", ")[0]
    return printed.index(name) if name in printed else len(printed)


def ordered(names: Iterable[str]) -> list[str]:
    """`names` without duplicates, in the order of legends and tables."""
    return sorted(dict.fromkeys(names), key=rank)
