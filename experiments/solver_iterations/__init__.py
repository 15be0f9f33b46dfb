"""Figure 1: error against solver iterations; see README.md."""
