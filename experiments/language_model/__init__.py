"""Language models with local linear attention; see README.md."""
