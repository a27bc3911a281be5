"""``python -m duoka``: the same as the ``duoka`` command, which imports nothing from the working folder."""

import os
import sys

if __name__ == "__main__" and sys.path[:1] == [os.getcwd()]:
    sys.path[0] = os.path.dirname(sys.executable)  # noqa: PTH120 - the first entry of the command, in place of Python's

from duoka.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
