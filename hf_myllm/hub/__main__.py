"""Entry point: `python -m hf_myllm.hub push RUN user/name` is `hf-myllm push RUN user/name`."""

import sys

from ..cli import main

if __name__ == "__main__":
    main(sys.argv[1:])
