"""Modules of timm whose structure alone does not tell how to shrink them: one file per family."""
