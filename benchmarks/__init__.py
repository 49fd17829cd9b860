"""Demo and benchmarks of ``cg_optim``: real models, real text, and the real peers."""

import logging

# PEFT imports bitsandbytes where it is installed, and on some processors that asks on
# stderr for an optional package nobody here needs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
