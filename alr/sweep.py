"""Record a suite of runs: `python -m alr.sweep data/suites/NAME.toml`.  The program is `alr.evidence.sweep`."""

import sys

from .evidence.sweep import main

if __name__ == "__main__":
    sys.exit(main())
