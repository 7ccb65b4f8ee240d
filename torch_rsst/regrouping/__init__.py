"""Groups, scores and a budget → refill mask, and the history of such decisions."""
