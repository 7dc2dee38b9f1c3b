"""Definition and training of models, and checkpoints that hold only the trained parameters."""

import logging

# Peft imports bitsandbytes wherever it is installed, which then warns that the hub's kernels are missing.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
