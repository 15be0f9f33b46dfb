"""What the figures of trained models share: result files, tables, learning curves and plots."""
