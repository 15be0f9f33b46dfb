"""Figure 1: memory and time against the sequence length; see README.md."""
