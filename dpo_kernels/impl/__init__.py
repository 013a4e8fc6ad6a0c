"""Implementations of the fused log-probabilities; `interface.py` says what each provides."""
