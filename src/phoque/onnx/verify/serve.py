"""`phoque verify-onnx --serve`: serve a chat page for the export on this machine; the page uses no other host."""

from phoque.checks import Verdict
from phoque.errors import UsageError
from phoque.onnx.transformers_js import WASM_PREFERENCE
from phoque.onnx.verify.export_dir import LocalExport
from phoque.onnx.verify.files import check_files
from phoque.onnx.verify.js_client import CLIENT, MODEL_NAME, list_urls
from phoque.onnx.verify.run import open_export
from phoque.page_server import PageServer, serve_page
from phoque.services import Services
from phoque.settings.chat import ChatSettings
from phoque.settings.verify_onnx import LEVELS, VerifySettings


def serve_export(s: VerifySettings, services: Services) -> None:
    """Serve the chat page until Ctrl-C.

    Raises UsageError if the folder is not an export, Transformers.js is not installed, or the port is taken.
    """
    if why := CLIENT.find_problem(services, install=s.install, node=False):
        raise UsageError(
            what="The page cannot be served.",
            why=f"{why[0].upper()}{why[1:]}.",
            fix="Run it with --install, or install what is missing.",
        )
    folder = open_export(s, services).fetch_all().absolute()
    verdict = Verdict(LEVELS)
    layout, available = check_files(LocalExport(folder), verdict)
    for check in verdict.failed_checks():
        services.console.warn(check.said)
    if not available:
        raise UsageError(
            what=f"{folder} is not an export.", why="There is no decoder in onnx/.", fix="Check --local-dir."
        )
    choices = [dtype for dtype in WASM_PREFERENCE if dtype in available and (not s.dtype or dtype in s.dtype)]
    info = {"engine": "onnx", "name": folder.name, "path": MODEL_NAME, "layout": layout, "choices": choices}
    info["sampling"] = ChatSettings().sampling
    folders = {"/modules/": CLIENT.modules(services.cache)}
    serve_page(PageServer(s.port, folders, info, files=list_urls(folder)), services.console)
