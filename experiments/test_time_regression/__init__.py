"""Figure 2: test-time regression; see README.md."""
