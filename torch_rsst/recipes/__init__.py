"""Recipes: data, model and training loop behind ``torch-rsst run``, on well-kept libraries.

The pruning is the library's; training stands on Accelerate, timm and torchvision.
"""
