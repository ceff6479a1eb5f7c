"""`python -m pyppo`, which is `pyppo`."""

import sys

from pyppo.cli import main

if __name__ == "__main__":
    sys.exit(main())
