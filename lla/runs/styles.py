"""How every series looks in every figure: its name, colour, marker and line, and the order.

A colour belongs to one mechanism. Other implementations of a mechanism, and others of its options,
have its colour with a marker of their own, open or on a dashed line. The colours extend Okabe and
Ito's palette; `tests/experiments/test_styles.py` checks that those of mechanisms stay apart under
protanopia, deuteranopia and tritanopia.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

# Points, of markers that look smaller than others.
_SIZES = {"*": 7.2, "P": 6.0, "X": 6.0, "<": 5.2, ">": 5.2, "^": 5.2, "v": 5.2, "d": 5.5, "_": 7.0}


@dataclasses.dataclass(frozen=True)
class Style:
    """How a series looks.

    Attributes:
      name: as printed in legends and tables.
      colour: hexadecimal.
      marker, line: as Matplotlib calls them.
      filled: whether the marker is, with `colour`; an open one is white inside.
    """

    name: str
    colour: str
    marker: str
    line: str = "-"
    filled: bool = True

    def options(self) -> dict[str, Any]:
        """Arguments of `Axes.plot` and `Axes.errorbar`."""
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

# By the name in configs and result files, in the order of legends and tables.
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
    # Estimates with local weights and without: LLA and softmax attention have them.
    "local linear (LLA)": Style("Local linear (LLA)", _LLA, "o"),
    "local constant (softmax)": Style("Local constant (softmax)", _SOFTMAX, "s"),
    "global linear": Style("Global linear", _LLA, "o", "--", False),
    "global constant": Style("Global constant", _SOFTMAX, "s", "--", False),
    "oracle": Style("Oracle (segments known)", "#000000", "_", "--"),
}

# Mechanisms that were published with short convolutions, and with normalised queries and keys.
CONVOLUTIONAL = ("mesanet", "deltanet", "gated_deltanet", "mamba", "mamba2", "hyena")
NORMALISED = ("lla", "parallax")


def style(name: str, short_conv: int | None = None, qk_norm: bool | None = None) -> Style:
    """The style of a series; one that is not in `STYLES` is grey and called by its `name`.

    A mechanism with an option that it was published without, or without one that it was published
    with, is said to be so, and has an open marker and another line.

    Args:
      name: in configs and result files.
      short_conv, qk_norm: its options, where they are known.
    """
    found = STYLES.get(name, Style(name, "#555555", "8", "-."))
    if short_conv is not None and bool(short_conv) != (name in CONVOLUTIONAL):
        found = _other(found, "conv." if short_conv else "no conv.", ":")
    if qk_norm is not None and qk_norm != (name in NORMALISED):
        found = _other(found, "QK-norm" if qk_norm else "no QK-norm", "--")
    return found


def _other(found, what, line):
    line = line if found.filled else "-."  # of two others
    return dataclasses.replace(found, name=f"{found.name}, {what}", line=line, filled=False)


def rank(name: str) -> int:
    """The place of a series in legends and tables; those that are not in `STYLES` come last."""
    return list(STYLES).index(name) if name in STYLES else len(STYLES)


def rank_of_name(name: str) -> int:
    """The place of a series that is printed as `name`, with or without remarks behind commas."""
    printed = [style.name for style in STYLES.values()]
    while name not in printed and ", " in name:
        name = name.rpartition(", ")[0]
    return printed.index(name) if name in printed else len(printed)


def ordered(names: Iterable[str]) -> list[str]:
    """`names` in the order of legends and tables, each once."""
    return sorted(dict.fromkeys(names), key=rank)
