"""Entry point: `python -m hf_myllm.reference markdown` or `schema`."""

import sys

from .errors import Parser, exit_on_input_error
from .models import FAMILIES
from .recipe.reference import render


@exit_on_input_error
def main(argv):
    parser = Parser(prog="python -m hf_myllm.reference", description="the keys of a recipe, for people and editors")
    parser.add_argument("form", choices=("markdown", "schema"))
    print(render(parser.parse_args(argv).form, FAMILIES))


if __name__ == "__main__":
    sys.exit(main())
