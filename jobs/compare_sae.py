# /// script
# requires-python = ">=3.11"
# dependencies = ["phoque[sae]==1.0.0"]
#
# [tool.hf-jobs]
# flavor = "a10g-large"
# timeout = "2h"
# secrets = ["HF_TOKEN"]
# ///
"""`phoque compare-sae` for `hf jobs uv run jobs/compare_sae.py`; settings are --env NAME=VALUE, see .env.example.

It needs what changed, UPDATED_MODEL or UPDATED_ADAPTER, and ARTIFACTS_REPO_ID to keep its work in.
"""

import sys

from phoque.cli.main import main

sys.argv = ["phoque", "compare-sae", *sys.argv[1:]]
main()
