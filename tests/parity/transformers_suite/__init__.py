"""Transformers' own common test mixins over our classes.

Transformers tests each of its models with the mixins of `tests/test_modeling_common.py`, `test_configuration_common.py`
and `test_pipeline_mixin.py`. They are in its source distribution, not in the installed package:

- `fetch.py` gets the source distribution of the installed version from PyPI into `.cache/` (ignored by git)
- `package.py` makes its test files importable and puts our `stand_ins/` where they import files that it lacks;
  `upstream.py` imports the mixins
- `model_tester.py`, `tiny_models.py` are what the mixins ask of a model's own test file: tiny configurations and inputs
- `skips.py` lists every reason for which one of their tests may be skipped here; `conftest.py` fails on any other
- `test_*.py` run them

Nothing of theirs is copied into this repository.
"""
