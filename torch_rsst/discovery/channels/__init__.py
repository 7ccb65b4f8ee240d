"""Channels of convolutions with everything they touch, read off one run of the model.

``trace`` follows each channel through the operators of the run by the ``rules``; ``ledger`` collects
what stands or falls together; ``layers`` makes units of it, and ``verify`` cuts them from a copy.
"""
