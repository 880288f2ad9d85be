"""`python -m zeroxide.cli` is the command `zeroxide`."""

import sys

from zeroxide.cli import main

if __name__ == "__main__":
    sys.exit(main())
