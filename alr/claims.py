"""Compute the book's claims from its records: `python -m alr.claims`.  The program is `alr.evidence.claims`."""

import sys

from .evidence.claims import main

if __name__ == "__main__":
    sys.exit(main())
