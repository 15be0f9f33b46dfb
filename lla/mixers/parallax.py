"""Parallax: softmax attention corrected along a learned probe."""

from lla.mixers.softmax import Softmax


class Parallax(Softmax):
    """Parallax (arXiv 2605.29157): ``o_i = sum_j p_ij (1 - (k_j - k_mean_i).r_i) v_j``.

    p are softmax weights, k_mean is their mean key, and the probe ``r = W_R x`` is a projection of
    the token. It starts at zero, which is softmax attention. The dense reference is
    ``implementation="reference"``.

    Args:
      width, num_heads, num_kv_heads, head_dim, value_dim, qk_norm, scale, relative_scale,
        local_window_size, short_conv, implementation: as in `lla.mixers.softmax.Softmax`.
      rope_theta: base of rotary position embeddings of query, key and probe; None for none.
      dtype, param_dtype, rngs: as in `lla.mixers.create`.

    Raises:
      ValueError: sizes or options outside their range.
    """

    _mechanism = "parallax"
