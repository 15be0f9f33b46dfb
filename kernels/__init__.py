"""Tile mathematics shared by every back end, and the Pallas kernels.

Imported as `lla.kernels`: setup.py maps this folder into the package. Code here works on the tiles
of one block of queries and knows nothing of batches, heads or dispatch, which belong to `lla.ops`.
"""
