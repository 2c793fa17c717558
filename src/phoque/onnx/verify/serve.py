"""`phoque verify-onnx --serve`: serve a chat page for the export on this machine; the page uses no other host."""

import json
import subprocess
from urllib.parse import urlencode

from phoque.errors import UsageError
from phoque.onnx.transformers_js import DTYPE_PREFERENCE
from phoque.onnx.verify.checks import Verdict
from phoque.onnx.verify.export_dir import LocalExport
from phoque.onnx.verify.files import check_files
from phoque.onnx.verify.js_client import CLIENT_FILES, copy_scripts, locate_client, prepare_client
from phoque.onnx.verify.run import open_export
from phoque.services import Services
from phoque.settings.environment import environment_without_secrets
from phoque.settings.verify_onnx import VerifySettings


def serve_export(s: VerifySettings, services: Services) -> None:
    """Serve the chat page until Ctrl-C.

    Raises UsageError if the folder is not an export, Transformers.js is not installed, or the port is taken.
    """
    console = services.console
    if why := prepare_client(s, services, ("node",)):
        raise UsageError(
            what="The page cannot be served.",
            why=f"{why[0].upper()}{why[1:]}.",
            fix="Fix this, then run the same command.",
        )
    folder = open_export(s, services).fetch_all().absolute()
    verdict = Verdict()
    layout, available = check_files(LocalExport(folder), verdict)
    for check in verdict.failed_checks():
        console.warn(check.said)
    if not available:
        raise UsageError(
            what=f"{folder} is not an export.", why="There is no decoder in onnx/.", fix="Check --local-dir."
        )
    dtypes = [dtype for dtype in DTYPE_PREFERENCE if dtype in available and (not s.dtype or dtype in s.dtype)]
    options = {
        "client": str(CLIENT_FILES),
        "modules": str(locate_client(services.cache) / "node_modules"),
        "root": str(folder.parent),
        "name": folder.name,
        "port": s.port,
    }
    command = ["node", "serve.mjs", json.dumps(options)]
    with subprocess.Popen(
        command,
        cwd=copy_scripts(services.cache),
        stdin=subprocess.PIPE,  # it closes however this process ends, and the server ends with it
        stdout=subprocess.PIPE,
        text=True,
        env=environment_without_secrets(),
    ) as server:
        assert server.stdout
        reply = json.loads(server.stdout.readline() or '{"error": "node exited without an answer"}')
        if "error" in reply:
            raise UsageError(
                what="The page cannot be served.", why=reply["error"], fix="Choose another --port, or 0 for a free one."
            )
        query = urlencode({"name": folder.name, "layout": layout, "dtypes": ",".join(dtypes)})
        url = f"http://127.0.0.1:{reply['port']}/?{query}"
        console.result({"url": url}, lambda: f"{url}\nPress Ctrl-C to stop the server.", url)
        try:
            server.wait()
        except KeyboardInterrupt:
            server.terminate()
