"""How much accuracy pruning costs, by this library's methods and by what people would do otherwise."""
