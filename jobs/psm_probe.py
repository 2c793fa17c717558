# /// script
# requires-python = ">=3.11"
# dependencies = ["phoque==1.0.0"]
#
# [tool.hf-jobs]
# flavor = "a10g-large"
# timeout = "2h"
# secrets = ["HF_TOKEN"]
# ///
"""`phoque psm-probe` for `hf jobs uv run jobs/psm_probe.py`; settings are --env NAME=VALUE, see .env.example.

It needs MODEL_SOURCE or ADAPTER_SOURCE, ARTIFACTS_REPO_ID to keep its work in, and the persona: PHOQUE_PERSONA names a
file in a Hub dataset (owner/name/file.toml), or DATASET_REPO the data that the adapter was trained on.
"""

import sys

from phoque.cli.main import main

sys.argv = ["phoque", "psm-probe", *sys.argv[1:]]
main()
