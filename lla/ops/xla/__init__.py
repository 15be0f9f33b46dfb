"""The blockwise back end in plain XLA, for every platform."""
