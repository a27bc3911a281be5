"""``python -m duoka``: the same as the ``duoka`` command."""

import sys

from duoka.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
