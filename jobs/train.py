# /// script
# requires-python = ">=3.11"
# dependencies = ["phoque==1.0.0"]
#
# [tool.hf-jobs]
# flavor = "a10g-large"
# timeout = "4h"
# secrets = ["HF_TOKEN"]
# ///
"""`phoque train` for `hf jobs uv run jobs/train.py`, with settings as --env NAME=VALUE: .env.example has the names.

Add --secrets WANDB_API_KEY for W&B. A Job cannot ask the Hub for its time limit: give it as --env PHOQUE_TIMEOUT=4h,
and the run stops and saves just before it. Without it, the run saves after 1 minute, then 2, 4 and so on up to 20.
"""

import sys

from phoque.cli.main import main

sys.argv = ["phoque", "train", *sys.argv[1:]]
main()
