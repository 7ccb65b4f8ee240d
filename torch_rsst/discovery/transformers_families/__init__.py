"""Modules of Hugging Face transformers: one file per family."""
