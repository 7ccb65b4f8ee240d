"""Speed and memory of global pruning, measured side by side with PyTorch's own."""
