"""A model and its groups → sparsity and reasons as data."""
