"""Figure 4: multi-query associative recall; see README.md."""
