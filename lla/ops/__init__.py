"""The operator: public functions, reference, blockwise implementation and dispatch."""
