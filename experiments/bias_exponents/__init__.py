"""Bias of local-constant and local-linear fits against the bandwidth; see README.md."""
