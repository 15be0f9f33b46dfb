"""Time, memory and error of the operator, its kernels and the mixers; see README.md."""
