"""`python -m hf_myllm.hub push RUN user/name`."""

import sys

from .push import main

if __name__ == "__main__":
    sys.exit(main())
