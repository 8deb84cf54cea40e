"""``python -m stratavit``."""

import sys

from stratavit.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
