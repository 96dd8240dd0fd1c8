"""Entry point: `python -m hf_myllm.reference` is `hf-myllm reference`."""

import sys

from .cli import main

if __name__ == "__main__":
    main(["reference", *sys.argv[1:]])
