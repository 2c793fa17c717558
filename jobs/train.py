# /// script
# requires-python = ">=3.11"
# dependencies = ["phoque"]
#
# [tool.hf-jobs]
# flavor = "a10g-large"
# timeout = "4h"
# secrets = ["HF_TOKEN", "WANDB_API_KEY"]
# env = { PHOQUE_TIMEOUT = "4h" }
# ///
"""`phoque train` for `hf jobs uv run jobs/train.py`, with settings as --env NAME=VALUE: .env.example has the names."""

import sys

from phoque.cli import main

sys.argv = ["phoque", "train", *sys.argv[1:]]
main()
