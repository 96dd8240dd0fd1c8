"""Entry point: `python -m hf_myllm.prepare` is `hf-myllm prepare`."""

import sys

from .cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
