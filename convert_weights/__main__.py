"""`python -m convert_weights`: see `convert_weights.command`."""

import sys

from convert_weights.command import main

if __name__ == "__main__":
    sys.exit(main())
