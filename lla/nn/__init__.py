"""Flax modules: an attention layer, and the operator as `attention_fn` of Flax's layers."""

from lla.nn.drop_in import attention_fn
from lla.nn.layer import LocalLinearAttention
from lla.nn.ridge import weight_decay_mask

__all__ = ["LocalLinearAttention", "attention_fn", "weight_decay_mask"]
