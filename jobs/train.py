# /// script
# requires-python = ">=3.11"
# dependencies = ["phoque"]
#
# [tool.hf-jobs]
# flavor = "a10g-large"
# timeout = "4h"
# secrets = ["HF_TOKEN"]
# env = { PHOQUE_TIMEOUT = "4h" }
# ///
"""`phoque train` for `hf jobs uv run jobs/train.py`, with settings as --env NAME=VALUE: .env.example has the names.

Add --secrets WANDB_API_KEY for W&B. To change the time, change both: --timeout 8h --env PHOQUE_TIMEOUT=8h.
"""

import sys

from phoque.cli.main import main

sys.argv = ["phoque", "train", *sys.argv[1:]]
main()
