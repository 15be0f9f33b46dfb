"""The back end of Pallas kernels for TPUs."""
