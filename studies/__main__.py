"""``python -m studies``: comparisons with other density models, and the paper's tables and figures."""

import sys

from studies.cli import main

if __name__ == "__main__":
    sys.exit(main())
