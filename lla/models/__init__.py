"""Sequence models: a token mixer by name, and what stands around it."""

from lla.models.sequence import ModelConfig, SequenceModel

__all__ = ["ModelConfig", "SequenceModel"]
