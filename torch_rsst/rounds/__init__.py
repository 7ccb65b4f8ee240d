"""RSST and Refill: rank, regroup, train, as explicit and resumable state."""
