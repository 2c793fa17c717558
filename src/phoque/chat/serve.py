"""`phoque chat --serve`: the chat page for a model that runs in this process."""

from collections.abc import Iterator
from typing import Any

from phoque.chat.answer import generate_answer
from phoque.chat.find import find_chat
from phoque.chat.models import ChatModel
from phoque.chat.sampling import Sampling
from phoque.errors import PhoqueError
from phoque.page_server import PageServer, serve_page
from phoque.services import Services
from phoque.settings.chat import ChatSettings
from phoque.settings.fields import Resolved

MAX_NEW_TOKENS = 4096  # that a page may ask for


def serve_chat(resolved: Resolved[ChatSettings], services: Services) -> None:
    """Serve the chat page until Ctrl-C. Raises UsageError if the port is taken."""
    s = resolved.settings
    chat_model = find_chat(s, services)
    chat = PageChat(chat_model.load(), Sampling(**s.sampling))
    info = {
        "engine": "server",
        "name": chat_model.name,
        "models": [model.label for model in chat.models],
        "system": chat_model.system,
        "sampling": vars(chat.sampling),
    }
    serve_page(PageServer(s.port, {}, info, chat.answer), services.console)


class PageChat:
    """Answers the page's requests: {messages, model, number, temperature, tokens, seed}."""

    def __init__(self, models: list[ChatModel], sampling: Sampling) -> None:
        self.models, self.sampling = models, sampling

    def answer(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield {token} for each piece of the answer, then {done}; {error} for a request that cannot be answered."""
        try:
            model = next(model for model in self.models if model.label == request.get("model", self.models[-1].label))
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in request["messages"]]
            sampling = self._sampling(request)
            number = int(request.get("number", 0))
        except (StopIteration, KeyError, TypeError, ValueError, OverflowError) as error:
            yield {"error": f"The request cannot be read: {type(error).__name__}."}
            return
        yield from self._stream(model, messages, sampling, number)

    def _stream(
        self, model: ChatModel, messages: list[dict[str, str]], sampling: Sampling, number: int
    ) -> Iterator[dict[str, Any]]:
        # a generator cannot yield from within a callback: the answer runs in a thread, and its pieces come over a queue
        from queue import Queue
        from threading import Event, Thread

        pieces: Queue[dict[str, Any]] = Queue()
        stop = Event()

        def show(piece: str) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            pieces.put({"token": piece})

        def run() -> None:
            try:
                answer = generate_answer(model, messages, sampling, number=number, show=show)
                pieces.put({"done": answer.to_json()})
            except PhoqueError as error:
                pieces.put({"error": f"{error.what} {error.why}"})
            except Exception as error:  # whatever a library raises must reach the page, not only the log
                pieces.put({"error": f"{type(error).__name__}: {error}"})

        thread = Thread(target=run, daemon=True)  # Ctrl-C must not wait for an answer
        thread.start()
        try:
            while True:
                event = pieces.get()
                yield event
                if "token" not in event:
                    return
        finally:  # also when the page has left
            stop.set()
            thread.join()

    def _sampling(self, request: dict[str, Any]) -> Sampling:
        s = self.sampling
        return Sampling(
            tokens=min(MAX_NEW_TOKENS, max(1, int(request.get("tokens", s.tokens)))),
            temperature=max(0.0, float(request.get("temperature", s.temperature))),
            top_p=s.top_p,
            penalty=s.penalty,
            seed=int(request.get("seed", s.seed)),
        )
