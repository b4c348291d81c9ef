"""``python -m megatron_bert`` is the command ``megatron-bert``."""

import sys

from megatron_bert.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
