"""`python -m runtimes.bench.search` under its name before 0.2."""

import sys

from runtimes.bench.search import main

if __name__ == "__main__":
    sys.exit(main())
