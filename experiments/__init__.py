"""The experiments: one folder per figure, the benchmarks, and the commands that train models."""
