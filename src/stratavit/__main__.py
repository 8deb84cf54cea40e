"""``python -m stratavit``."""

import sys

from stratavit.cli import main

if __name__ == "__main__":
    sys.exit(main())
