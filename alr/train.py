"""Train a language model with adaptive rank: `python -m alr.train --help`.  The program is `alr.lab`."""

import sys

from .lab.command import main

if __name__ == "__main__":
    sys.exit(main())
