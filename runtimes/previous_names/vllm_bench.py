"""`python -m runtimes.bench.vllm` under its name before 0.2."""

import sys

from runtimes.bench.vllm import main

if __name__ == "__main__":
    sys.exit(main())
