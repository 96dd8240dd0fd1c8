"""Entry point: `python -m hf_myllm.prepare`."""

import sys

from .build import main

if __name__ == "__main__":
    sys.exit(main())
