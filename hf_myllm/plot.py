"""Entry point: `python -m hf_myllm.plot` is `hf-myllm plot`."""

import sys

from .cli import main

if __name__ == "__main__":
    main(["plot", *sys.argv[1:]])
