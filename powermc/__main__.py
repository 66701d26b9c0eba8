"""`python -m powermc`."""

import sys

from powermc.cli import main

if __name__ == "__main__":
    sys.exit(main())
