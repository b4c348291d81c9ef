"""Predictions from trained models: texts in, answers out, in batches."""
