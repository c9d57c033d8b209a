"""`python -m bitbell` is the command `bitbell`."""

import sys

from bitbell.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
