"""Figure 5: permutation state tracking; see README.md."""
