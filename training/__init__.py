"""Middle floor: defines models, trains them, and writes checkpoints that hold only what was trained."""

import logging

# Peft imports it wherever it is installed, and it warns every time that the hub's kernels are not there.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
