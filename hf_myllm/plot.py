"""Entry point: `python -m hf_myllm.plot`."""

import sys

from .reporting.plots import main

if __name__ == "__main__":
    sys.exit(main())
