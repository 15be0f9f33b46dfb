"""Data: synthetic tasks as pure functions of (seed, config), and real series."""
