"""`python -m runtimes.search.index` under its name before 0.2."""

import sys

from runtimes.search.index import main

if __name__ == "__main__":
    sys.exit(main())
