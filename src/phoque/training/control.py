"""Train the control of a run: the same prompts, the same recipe, but the base model's own answers.

What a fine-tune changes merely by being a fine-tune (the format, the length, the optimizer's noise), the control
changes too, so both probes subtract it. With several seeds, the spread between controls is the floor that a finding has
to beat. The controls are runs of their own: their checkpoints are pushed and resumed like any other's.
"""

import hashlib
import json
import math
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from phoque.data.chat_template import encode_prompt
from phoque.data.rows import parse_row
from phoque.data.turns import BadRow
from phoque.distributed.processes import current
from phoque.errors import Resumable, RunError
from phoque.files import read_json_object, write_atomically
from phoque.hub.store import Store
from phoque.inference.generate import Reply, Request, generate_replies
from phoque.models.load import load_model
from phoque.models.stop_tokens import stop_at_template
from phoque.services import Services
from phoque.settings.fields import Resolved
from phoque.settings.train import TrainSettings
from phoque.training.callbacks.stop import StopRequest
from phoque.training.prepare import Prepared, conversations_per_step, find_store
from phoque.training.run_record import RECORD, write_record

CHUNK = 256  # conversations whose answers are generated together
MAX_ANSWER = 512  # tokens
LEAST_SECONDS = 120  # before the deadline, below which no further chunk is begun, or 1.5 of the slowest chunk so far
CUT_CHARACTER = "\ufffd"
PLAIN_ROLES = {"system", "user", "assistant"}

Messages = list[dict[str, Any]]


def plan_controls(s: TrainSettings, steps: int) -> list[TrainSettings]:
    """The settings of each control run, without its dataset: as the run's own but for the seed and where it goes.

    A control trains for as many `steps` as the run's adapter did, which ended early or kept an earlier step.
    """
    controls = []
    for number in range(1, s.control_seeds + 1):
        suffix = f"control-{number}"
        controls.append(
            s.model_copy(
                update={
                    "with_control": False,
                    "max_steps": steps,
                    "epochs": None,
                    "keep_best": False,
                    "early_stop": None,
                    "output_dir": s.folder / suffix,
                    "hub_model_id": f"{s.hub_model_id}-{suffix}" if s.hub_model_id else None,
                    "run_dir": f"{s.run_dir}/{suffix}" if s.run_dir else None,
                    "seed": s.seed + number,
                    "dataset_revision": None,
                    "dataset_config": None,
                    "split": "train",
                    "eval_split": None,
                    "merged_hub_model_id": None,
                    "export_merged": False,
                    "export_on_save": False,
                    "sample_every": 0,
                    "yes": True,  # a fresh start was confirmed for the run itself
                }
            )
        )
    return controls


def make_control_rows(s: TrainSettings, ready: Prepared, services: Services, deadline: float | None) -> Path:
    """The path of the control's dataset, in every process; process 0 writes it, and all generate the answers."""
    processes = current()
    if not processes.is_main:
        _answer_for_main(ready, s)
        return processes.broadcast_from_main(Path)  # what process 0 returns
    rows = write_control_rows(s, ready, services, deadline)
    processes.broadcast_from_main(lambda: None)  # there is nothing more to answer
    return processes.broadcast_from_main(lambda: rows)


def write_control_rows(s: TrainSettings, ready: Prepared, services: Services, deadline: float | None) -> Path:
    """Write the control's dataset into the run folder, or find it there or in the run's store; return its path.

    Answers are greedy, generated without the row's system prompt, which may ask for the persona. A generation that was
    cut off goes on with the next conversations. Raises Resumable before the deadline.
    """
    console = services.console
    store = find_store(s, services)
    per_step = max(s.batch_size, conversations_per_step(s, ready.scan, current().size))
    count = math.ceil(s.max_steps * per_step)
    count = min(count, ready.scan.trained_rows or count)
    made_of = (ready.source.revision, ready.dataset.revision, count)
    made_of += (s.dataset_config, s.split, s.default_system, s.quantization, s.max_length)
    prefix = f"control-rows-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]}"
    if path := _find_rows(prefix, s.folder, store):
        return path
    stop = StopRequest(console, deadline, s.seconds or 0.0)
    with stop.handle_signals():
        console.stage(f"control: the base model answers {count} conversations")
        partial = s.folder / f"{prefix}.partial"
        written = _generate_rows(ready, s, count, partial, stop)
        if not written:
            raise RunError(
                what="No conversation can be given to a control run.",
                why="All have tools or other roles than system, user and assistant, or got empty answers.",
                fix="Train without --with-control, and make a control dataset by hand.",
            )
        text = "".join(written)
        path = s.folder / f"{prefix}-{_digest(text.encode())}.jsonl"
        write_atomically(path, text)
        partial.unlink()
        if store and store.private():  # the rows hold the dataset's own conversations
            store.push({path.name: path}, "Answers of the base model, for the control", lambda _: [])
    return path


def _find_rows(prefix: str, folder: Path, store: Store | None) -> Path | None:
    """The control's rows here or in the store; their name ends with a hash of the content, so that none is cut off."""
    is_whole = lambda path: path.stem == prefix or path.stem == f"{prefix}-{_digest(path.read_bytes())}"
    if whole := next(filter(is_whole, sorted(folder.glob(f"{prefix}*.jsonl"))), None):
        return whole
    snapshot = store.snapshot() if store else None
    for name in sorted(snapshot.files) if snapshot else ():
        if store and snapshot and name.startswith(prefix) and name.endswith(".jsonl"):
            fetched = store.fetch(snapshot, name, folder)
            if is_whole(fetched):
                return fetched
            fetched.unlink()
    return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def record_controls(s: TrainSettings, controls: list[TrainSettings], services: Services) -> None:
    """Note the finished controls in the run's record, here and in its store, where the probes find them."""
    record = read_json_object(s.folder / RECORD)
    record["controls"] = [
        {"folder": control.folder.name, "repo": control.hub_model_id, "seed": control.seed} for control in controls
    ]
    write_record(s.folder, record)
    if store := find_store(s, services):
        store.push({RECORD: s.folder / RECORD}, "Controls", lambda _: [])


def _generate_rows(ready: Prepared, s: TrainSettings, count: int, partial: Path, stop: StopRequest) -> list[str]:
    """Generate the base model's answers chunk by chunk; return the lines of all rows that have them."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    lines = _read_complete_lines(partial)
    model = _load_base(ready, s)
    limit, slowest = _answer_limit(ready), 0.0
    with closing(_plain_rows(ready, count)) as rows, partial.open("a", encoding="utf-8") as out:
        out.truncate(sum(len(line.encode()) for line in lines))
        for _ in islice(rows, len(lines)):
            pass
        with stop.console.progress(count, len(lines)) as show:
            chunk_size = CHUNK * current().size
            while len(lines) < count and (chunk := list(islice(rows, min(chunk_size, count - len(lines))))):
                if stop.seconds_left is not None and stop.seconds_left < max(LEAST_SECONDS, 1.5 * slowest):
                    raise Resumable(
                        what="The deadline came before the control was trained.",
                        why=f"{len(lines)} of {count} conversations have the base model's answers.",
                        fix="Run the same command again.",
                    )
                begun = time.monotonic()
                fresh = [
                    json.dumps({"messages": _shorten(ready, messages or []), "source": source}, ensure_ascii=False)
                    + "\n"
                    for messages, (_, source) in zip(
                        _answer(model, ready, [messages for messages, _ in chunk], limit), chunk, strict=True
                    )
                ]
                out.writelines(fresh)
                out.flush()
                lines += fresh
                slowest = max(slowest, time.monotonic() - begun)
                show(len(lines), "answers of the base model")
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [line for line in lines if json.loads(line)["messages"]]


def _read_complete_lines(file: Path) -> list[str]:
    """The lines of a file that a stop may have cut off; each ends with a newline."""
    text = file.read_bytes().decode(errors="replace") if file.is_file() else ""
    return [f"{line}\n" for line in text.split("\n")[:-1]]


def _shorten(ready: Prepared, messages: Messages) -> Messages:
    """The conversation up to the last answer with which it can be trained on; [] if there is none.

    The base model's answers are often longer than the dataset's, so that several of them exceed --max-length.
    """
    while messages:
        try:
            ready.chat.encode(messages)
            return messages
        except BadRow:
            ends = [n for n, turn in enumerate(messages[:-1]) if turn["role"] == "assistant"]
            messages = messages[: ends[-1] + 1] if ends else []
    return messages


def _plain_rows(ready: Prepared, most: int) -> Generator[tuple[Messages, str]]:
    """The conversations that have plain text alone and are not held out, with their sources.

    If the dataset has more than the run needs, they are spread evenly over it, because data is often sorted by topic.
    """
    needed, every = ready.scan.trained_rows or 0, 1
    if needed > most:
        every = needed // most
    for number, raw in enumerate(ready.dataset.stream):
        if number % every:
            continue
        try:
            row = parse_row(raw)
        except BadRow:
            continue  # `phoque train` counts and reports bad rows
        if ready.scan.rule.excludes(row):
            continue
        if not row.tools and all(turn["role"] in PLAIN_ROLES and "tool_calls" not in turn for turn in row.messages):
            yield row.messages, row.source


def _answer(model: Any, ready: Prepared, conversations: list[Messages], limit: int) -> list[Messages | None]:
    """Each conversation with the base model's answers in place of its own, turn by turn; None if an answer is empty."""
    answered: list[Messages | None] = [[] for _ in conversations]
    for place in range(max(len(messages) for messages in conversations)):
        open_rows = []
        for n, messages in enumerate(conversations):
            so_far = answered[n]
            if so_far is None or place >= len(messages):
                continue
            if messages[place]["role"] == "assistant" and any(turn["role"] == "user" for turn in so_far):
                open_rows.append(n)
            elif messages[place]["role"] != "assistant":  # a greeting before any question has no prompt to answer
                so_far.append({"role": messages[place]["role"], "content": messages[place]["content"]})
        requests = [Request(_prompt_ids(ready, answered[n] or [])) for n in open_rows]
        current().broadcast_from_main(lambda: (requests, limit))  # noqa: B023, called at once
        replies = _generate_together(model, requests, limit)
        for n, reply in zip(open_rows, replies, strict=True):
            text = str(ready.chat.tokenizer.decode(reply.ids, skip_special_tokens=True))
            text = text.strip().rstrip(CUT_CHARACTER)  # an answer may end in the middle of a character
            so_far = answered[n]
            if so_far is not None:
                usable = text and CUT_CHARACTER not in text
                answered[n] = [*so_far, {"role": "assistant", "content": text}] if usable else None
    return [messages if messages and messages[-1]["role"] == "assistant" else None for messages in answered]


def _load_base(ready: Prepared, s: TrainSettings) -> Any:
    return stop_at_template(load_model(ready.source, s.quantization).eval(), ready.chat.tokenizer)


def _answer_for_main(ready: Prepared, s: TrainSettings) -> None:
    """Answer this process's share of what process 0 asks the base model, until it has no more."""
    model: Any = None
    while (work := current().broadcast_from_main(lambda: None)) is not None:
        model = model or _load_base(ready, s)
        requests, limit = work
        _generate_together(model, requests, limit)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _generate_together(model: Any, requests: list[Request], limit: int) -> list[Reply]:
    """The replies to all requests, each process generating its share."""
    return current().share_work(
        [len(request.prompt) for request in requests],
        lambda numbers: _generate(model, [requests[n] for n in numbers], limit),
    )


def _generate(model: Any, requests: list[Request], limit: int) -> list[Reply]:
    """Greedy replies; where memory runs out, the requests are halved."""
    if not requests:
        return []
    try:
        return generate_replies(model, requests, limit, temperature=1.0, top_p=1.0)
    except torch.OutOfMemoryError:
        if len(requests) == 1:
            raise
        torch.cuda.empty_cache()
    half = len(requests) // 2
    return _generate(model, requests[:half], limit) + _generate(model, requests[half:], limit)


def _prompt_ids(ready: Prepared, messages: Messages) -> list[int]:
    plain = [turn for turn in messages if turn["role"] != "system"]
    return encode_prompt(ready.chat.tokenizer, ready.chat.with_system(plain))


def _answer_limit(ready: Prepared) -> int:
    """Tokens that nearly all answers of the dataset's first rows have at most, so that both runs train on as many."""
    lengths = [
        len(ready.chat.tokenizer(turn["content"], add_special_tokens=False)["input_ids"])
        for messages, _ in islice(_plain_rows(ready, CHUNK), CHUNK)
        for turn in messages
        if turn["role"] == "assistant"
    ]
    return min(MAX_ANSWER, max(8, sorted(lengths)[int(0.95 * (len(lengths) - 1))])) if lengths else MAX_ANSWER


def with_dataset(resolved: Resolved[TrainSettings], control: TrainSettings, rows: Path) -> Resolved[TrainSettings]:
    """The settings of a control run that trains on these rows."""
    return replace(resolved, settings=control.model_copy(update={"dataset": str(rows)}))
