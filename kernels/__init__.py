"""Tile mathematics shared by every back end, and the Pallas kernels.

Imported as `lla.kernels`: setup.py maps this folder into the package. The shared code works on one
tile of queries at a time. Batches, heads and dispatch belong to `lla.ops`.
"""
