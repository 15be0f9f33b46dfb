"""Figure 3: in-context regression; see README.md."""
