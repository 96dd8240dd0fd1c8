"""Entry point: `python -m hf_myllm.page` is `hf-myllm report`."""

import sys

from .cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
