"""The `slipway` command: python -m slipway"""

import sys

from slipway.command import main

if __name__ == "__main__":
    sys.exit(main())
