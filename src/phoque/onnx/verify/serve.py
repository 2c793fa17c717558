"""`phoque verify-onnx --serve`: the export in a chat page on this machine, with nothing fetched from elsewhere."""

import json
import subprocess
from pathlib import Path
from urllib.parse import urlencode

from phoque.console import Console
from phoque.errors import PhoqueError
from phoque.onnx.transformers_js import DTYPE_PREFERENCE
from phoque.onnx.verify.checks import Verdict
from phoque.onnx.verify.export_dir import Local
from phoque.onnx.verify.files import check_files
from phoque.onnx.verify.js_client import HERE, copied, missing, modules
from phoque.onnx.verify.run import place_of
from phoque.settings.fields import Resolved
from phoque.settings.verify_onnx import VerifySettings


def served(resolved: Resolved[VerifySettings], cache: Path, console: Console) -> None:
    """Serve until Ctrl-C. Raises PhoqueError (2) for what is no export, or where Transformers.js is not installed."""
    s = resolved.settings
    if why := missing(s, cache, console, ("node",)):
        raise PhoqueError("The page cannot be served.", f"{why[0].upper()}{why[1:]}.", "Then run the same command.")
    folder = place_of(resolved, cache, console).whole().absolute()
    verdict = Verdict()
    layout, there = check_files(Local(folder), verdict)
    for check in verdict.failed():
        console.warn(check.said)
    if not there:
        raise PhoqueError(f"{folder} is no export.", "There is no decoder in onnx/.", "Check --local-dir.")
    dtypes = [dtype for dtype in DTYPE_PREFERENCE if dtype in there and (not s.dtype or dtype in s.dtype)]
    asked = {
        "client": str(HERE),
        "modules": str(modules(cache) / "node_modules"),
        "root": str(folder.parent),
        "name": folder.name,
        "port": s.port,
    }
    command = ["node", "serve.mjs", json.dumps(asked)]
    with subprocess.Popen(command, cwd=copied(cache), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        said = json.loads(server.stdout.readline() or '{"error": "node ended"}')
        if "error" in said:
            raise PhoqueError(
                "The page cannot be served.", said["error"], "Choose another --port, or 0 for a free one."
            )
        query = urlencode({"name": folder.name, "layout": layout, "dtypes": ",".join(dtypes)})
        url = f"http://127.0.0.1:{said['port']}/?{query}"
        console.result({"url": url}, lambda: f"{url}\nCtrl-C ends it", url)
        try:
            server.wait()
        except KeyboardInterrupt:
            server.terminate()
