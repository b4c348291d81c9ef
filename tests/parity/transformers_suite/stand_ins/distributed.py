"""Stands in for `tests/distributed_testing_utils.py`."""
