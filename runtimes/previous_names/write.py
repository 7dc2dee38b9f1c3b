"""`python -m runtimes.generate` under the name that it had for byte language models before 0.2."""

import sys

from runtimes.generate import main

if __name__ == "__main__":
    sys.exit(main())
