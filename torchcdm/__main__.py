"""``python -m torchcdm``, for launchers that take a module."""

import sys

from torchcdm.cli import main

if __name__ == "__main__":
    sys.exit(main())
