"""Functions and pruning methods in the shape of :mod:`torch.nn.utils.prune`."""
