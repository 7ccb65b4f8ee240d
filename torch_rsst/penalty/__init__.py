"""The growing L2 penalty on the penalized set: attach, step, remove."""
