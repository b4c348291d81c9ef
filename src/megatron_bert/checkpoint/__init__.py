"""Checkpoints: what is in a folder, before and while a model is loaded from it."""
