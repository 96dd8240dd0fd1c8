"""Entry point: `python -m hf_myllm.page`."""

import sys

from .reporting.html import main

if __name__ == "__main__":
    sys.exit(main())
