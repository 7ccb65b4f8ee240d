"""A masked model → a smaller model with equal outputs; what models cost; budgets."""
