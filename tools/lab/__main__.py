"""`python -m tools.lab`."""

import sys

from tools.lab.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
