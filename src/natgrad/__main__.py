"""`python -m natgrad`: the command line of the races and the bench."""

import sys

from natgrad.race.cli import main

if __name__ == "__main__":
    sys.exit(main())
