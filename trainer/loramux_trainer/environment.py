"""Sets switches of the libraries below us, for this process. Import this before anything that imports them.

huggingface_hub reads its switches once, when it is imported; TRL reports every construction of a trainer unless it is
told otherwise. A user who wants the hub sets HF_HUB_OFFLINE=0. OpenMP's threads spin while they wait, which on a busy
machine takes the processor from the thread that they wait for.
"""

import logging
import os

DEFAULTS = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Environment variables that are set unless the user has set them."""

for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)

# It warns at import that an optional CPU kernel is not there, which we never call.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
