"""`python -m fastrbn`: the command line, also where the `fastrbn` script is not on the path."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
