"""`python -m spikingformer`: the command."""

import sys

from spikingformer.cli import main

if __name__ == "__main__":
    sys.exit(main())
