"""Masks of parameters: install, read, restore, freeze, load from checkpoints."""
