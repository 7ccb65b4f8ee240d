"""Compacted models in folders: described, written, loaded, exported, measured."""
