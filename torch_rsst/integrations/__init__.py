"""RSST and Refill in the trainers of Lightning and Hugging Face: thin adapters over :mod:`torch_rsst.rounds`.

==========================================  =========================================================
``lightning.py``, ``transformers.py``       the callbacks; each imports its framework
``driver.py``                               what both share: open, close, finalize, log, save, resume
``timetable.py``                            rounds in epochs or steps → optimizer steps
``batch.py``                                a batch of training data → what the model is called with
``masks_first.py``                          masks are made before masked weights are loaded
==========================================  =========================================================
"""
