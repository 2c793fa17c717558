"""`phoque verify-gguf --serve`: a chat page that runs the files in the browser; the page uses no other host."""

from phoque.errors import UsageError
from phoque.gguf.verify.clients import client
from phoque.gguf.verify.run import find_files
from phoque.page_server import PageServer, serve_page
from phoque.services import Services
from phoque.settings.chat import ChatSettings
from phoque.settings.verify_gguf import VerifyGgufSettings


def serve_files(s: VerifyGgufSettings, services: Services) -> None:
    """Serve the chat page until Ctrl-C. Raises UsageError if there is no file, no wllama, or the port is taken."""
    name, folder, files = find_files(s, services)
    npm = client()
    if why := npm.find_problem(services, install=s.install, node=False):
        raise UsageError(what="The page cannot be served.", why=f"{why[0].upper()}{why[1:]}.", fix="Add --install.")
    ordered = sorted(files, key=lambda file: file.stat().st_size)
    paths = {f"/models/{number}.gguf": file for number, file in enumerate(ordered)}
    by_name = dict(zip([file.stem for file in ordered], paths, strict=True))
    info = {"engine": "gguf", "name": folder.absolute().name, "choices": list(by_name), "files": by_name}
    info["sampling"] = ChatSettings().sampling
    server = PageServer(s.port, {"/modules/": npm.modules(services.cache)}, info, files=paths)
    services.console.say(f"{name}: {len(files)} files")
    serve_page(server, services.console)
