"""Recipes: data, model and training loop behind ``torch-rsst run``, on well-kept libraries.

Pruning is done by the library, training with Accelerate, timm and torchvision. From options to results:

==========================================  =========================================================
``config.py``, ``*_options.py``             the options, from the command line or YAML; ``configs/``
``images.py``, ``digits.py``, ``models.py`` data and model by name
``loading.py``, ``training.py``             batches, steps, epochs
``pruning.py``                              units and rounds, by the options
``experiment.py``, ``run_folder.py``        stages of a run, and its folder: resumable after any step
``forecast.py``                             the dry run
``pictures.py``, ``page.py``                pictures and the report
``training_text.py``                        what a run does, in sentences
``compacting.py``, ``predicting.py``        ``torch-rsst compact``, ``torch-rsst predict``
==========================================  =========================================================
"""
