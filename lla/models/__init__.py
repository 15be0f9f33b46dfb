"""Sequence models: a mixer by name, with embeddings, MLPs and a head around it."""

from lla.models.sequence import ModelConfig, SequenceModel

__all__ = ["ModelConfig", "SequenceModel"]
