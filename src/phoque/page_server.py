"""A local web server for the chat page: on 127.0.0.1 only, for this machine's own pages only."""

import json
import mimetypes
import sys
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Self, cast
from urllib.parse import unquote, urlsplit

from phoque.console import Console
from phoque.errors import UsageError

WEB = Path(__file__).with_name("web")  # the chat page
LOCAL_HOSTS = ("127.0.0.1", "localhost")  # against DNS rebinding from another site
MAX_REQUEST_BYTES = 1 << 20
CHUNK_BYTES = 1 << 20
HANDOVER_S = 3.0  # how long a request waits for the answer before it to end
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",  # wasm threads need these two
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'self'",
            "script-src 'self' 'wasm-unsafe-eval' blob:",
            "worker-src 'self' blob:",
            "connect-src 'self' blob: data:",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data:",
            "frame-ancestors 'none'",
        )
    ),
}
TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm", ".html": "text/html"}
Answer = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]


class PageServer:
    """Serves the chat page, and under their prefixes further folders; `answer` streams the answers to /api/chat.

    - `folders`: folders by prefix, such as {"/modules/": Path("node_modules")}; a link out of one is not followed.
    - `files`: single files by the path of their URL, such as {"/models/m/model.gguf": Path("seal.gguf")}.
    - `info`: what /api/info returns, which tells the page what it talks to.
    - `answer`: given the page's request, yields objects that are sent as server-sent events. One runs at a time.
    """

    def __init__(
        self,
        port: int,
        folders: dict[str, Path],
        info: dict[str, Any] | None = None,
        answer: Answer | None = None,
        files: dict[str, Path] | None = None,
    ) -> None:
        self.files = files or {}
        self.folders = {prefix: folder.resolve() for prefix, folder in folders.items()} | {"/": WEB.resolve()}
        self.info, self.answer, self.busy = info, answer, threading.Lock()
        try:
            self._server = _Server(("127.0.0.1", port), self)
        except OSError as error:
            raise UsageError(
                what="The page cannot be served.",
                why=f"Port {port}: {error.strerror}.",
                fix="Choose another --port, or 0 for a free one.",
            ) from error
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve_forever(self) -> None:
        """Serve until Ctrl-C."""
        try:
            self._server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            self._server.server_close()

    def find(self, path: str) -> Path | None:
        """The file of a URL's path, or None: no such file, or one outside of the served folders."""
        if path in self.files:
            return self.files[path]
        prefix, folder = next((p, f) for p, f in self.folders.items() if path.startswith(p))
        parts = PurePosixPath(path.removeprefix(prefix) or "chat.html").parts
        if any(part in ("..", "/") or "\\" in part or "\0" in part for part in parts):
            return None
        file = folder.joinpath(*parts)
        try:
            return file if file.is_file() and file.resolve().is_relative_to(folder) else None
        except OSError:  # a name that is too long
            return None


def serve_page(server: PageServer, console: Console) -> None:
    """Print the page's address, and serve it until Ctrl-C."""
    console.result({"url": server.url}, lambda: f"{server.url}\nPress Ctrl-C to stop the server.", server.url)
    server.serve_forever()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], page: PageServer) -> None:
        self.page = page
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what a request raised; that its reader left in the middle of an answer is no error."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal shows the page's address only."""

    def do_GET(self) -> None:
        page: PageServer = cast(_Server, self.server).page
        if not self._is_local():
            return self._refuse(HTTPStatus.FORBIDDEN)
        path = unquote(urlsplit(self.path).path)
        if path == "/api/info":
            return self._send_json(page.info or {})
        file = page.find(path) if path.startswith("/") else None
        if file is None:
            return self._refuse(HTTPStatus.NOT_FOUND)
        self._start(HTTPStatus.OK, TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0], file.stat().st_size)
        with file.open("rb") as stream:
            while self.command == "GET" and (chunk := stream.read(CHUNK_BYTES)):
                self.wfile.write(chunk)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        page: PageServer = cast(_Server, self.server).page
        # a page of another site can only send requests without such a type, and its origin is not this machine
        is_json = (self.headers.get("Content-Type") or "").partition(";")[0] == "application/json"
        if not (self._is_local() and is_json and self._is_same_origin()):
            return self._refuse(HTTPStatus.FORBIDDEN)
        if self.path != "/api/chat" or page.answer is None:
            return self._refuse(HTTPStatus.NOT_FOUND)
        request = self._read_json()
        if request is None:
            return self._refuse(HTTPStatus.BAD_REQUEST)
        if not page.busy.acquire(timeout=HANDOVER_S):
            return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        try:
            self._start(HTTPStatus.OK, "text/event-stream", None)
            for event in page.answer(request):
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
        finally:
            page.busy.release()
            self.close_connection = True

    def _read_json(self) -> dict[str, Any] | None:
        length = self.headers.get("Content-Length") or ""
        if not length.isdigit() or int(length) > MAX_REQUEST_BYTES:
            return None
        try:
            request = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            return None
        return request if isinstance(request, dict) else None

    def _is_local(self) -> bool:
        return (self.headers.get("Host") or "").rpartition(":")[0] in LOCAL_HOSTS or (
            self.headers.get("Host") in LOCAL_HOSTS
        )

    def _is_same_origin(self) -> bool:
        origin = self.headers.get("Origin")
        return origin is None or urlsplit(origin).netloc == self.headers.get("Host")

    def _send_json(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self._start(HTTPStatus.OK, "application/json", len(body))
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: HTTPStatus) -> None:
        self._start(status, None, 0)
        self.close_connection = True

    def _start(self, status: HTTPStatus, kind: str | None, length: int | None) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if kind:
            self.send_header("Content-Type", kind)
        if length is None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()
