"""The MAD benchmark; see README.md."""
