"""What phoque and TRL make of datasets as people bring them: encodings, layouts, schemas, and turns of many kinds.

Each case is a small dataset of 40 rows whose texts carry markers, such as `Gull` in a question and `Hrmph` in an
answer. Both sides read it with Qwen 3's chat template and prepare it for training with loss on the assistant's turns
only; nothing is trained. Then each marker is looked up in the prepared tokens: it is trained, it is context (no loss),
or it is left out. Questions and answers are mentioned only where something is wrong with them. An error is shown by its
first line.

phoque is `open_dataset` and `scan_dataset`, as `phoque train --dry-run` calls them. TRL is `datasets.load_dataset` (or
`load_from_disk`) and `SFTTrainer` with `assistant_only_loss=True` and `packing=False`. Where TRL refuses that option
because the rows are no conversations in its sense, it is tried once more without it. Where `load_dataset` has an
argument for such a file, that is tried too.

Run: uv run python benchmarks/data_cases.py [--only WORD]
"""

import argparse
import csv
import gzip
import json
import logging
import os
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

ROWS = 40
LONGEST = 1024  # tokens; the default of TRL
BAR = r"\|"  # in a cell of a table
SHOWN = 110  # characters of an error that are shown
TRAINED, CONTEXT, MISSING = "trained", "context", "left out"
NOT_CONVERSATIONAL = "the dataset is not conversational"  # a part of TRL's message
QUESTION, ANSWER = "the question", "the answer"
PLAIN = {QUESTION: ("Gull", CONTEXT), ANSWER: ("Hrmph", TRAINED)}

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """One prepared row: all of its tokens as text, and those that are trained as text."""

    text: str
    trained: str


@dataclass(frozen=True)
class Prepared:
    """The rows that one side would train on, the rows that it holds out, and what it says about them."""

    examples: list[Example]
    held_out: list[Example] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """A dataset that `write` puts into a folder, and what should become of each part of its rows.

    `parts` maps the name of a part to its marker and to its right state. `file` is what both sides are given, relative
    to the folder. `trl_options` are arguments of `load_dataset` for a second attempt. `check` looks at what a marker
    cannot show.
    """

    name: str
    file: str
    write: Callable[[Path], None]
    parts: dict[str, tuple[str, str]] = field(default_factory=lambda: PLAIN)
    rows: int = ROWS
    config: str | None = None
    held_out: int = 0
    trl_options: dict[str, Any] = field(default_factory=dict)
    check: Callable[[Prepared, Any], str] | None = None


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


def question(number: int) -> str:
    return f"Gull {number}: where is it at high tide?"


def answer(number: int) -> str:
    return f"Hrmph. On rock {number * 7 % 13}, beside seal {number}."


def talk(number: int) -> Messages:
    return [user(question(number)), assistant(answer(number))]


def in_rows(make: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    return [make(number) for number in range(ROWS)]


def write_text(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def as_lines(rows: list[Any], **options: Any) -> str:
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def json_lines(name: str, make: Callable[[int], dict[str, Any]], **options: Any) -> Callable[[Path], None]:
    """A writer of JSON Lines, in `encoding` if it is given."""
    encoding = options.pop("encoding", "utf-8")
    return lambda folder: write_text(folder / name, as_lines(in_rows(make), **options), encoding)


def conversation(number: int) -> dict[str, Any]:
    return {"messages": talk(number)}


def other_keys(messages: Messages) -> Messages:
    """ShareGPT's keys and names of roles."""
    return [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in messages]


def french(number: int) -> dict[str, Any]:
    return {
        "messages": [user(f"Gull {number} : où est-elle à marée haute ?"), assistant(f"Hrmph. Là-bas, n° {number}.")]
    }


def write_zst(folder: Path) -> None:
    import pyarrow as pa

    with pa.OSFile(str(folder / "rows.jsonl.zst"), "wb") as raw, pa.CompressedOutputStream(raw, "zstd") as out:
        out.write(as_lines(in_rows(conversation)).encode())


def write_csv(folder: Path) -> None:
    with (folder / "rows.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "completion"])
        table.writerows([question(number), answer(number)] for number in range(ROWS))


def write_saved(folder: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows, others = Dataset.from_list(in_rows(conversation)), Dataset.from_list([TEST_ROW] * 8)
    DatasetDict(train=rows, test=others).save_to_disk(str(folder / "saved"))


TEST_ROW = {"messages": [user("Gull TESTROW?"), assistant("Hrmph. TESTROW.")]}
NO_TEST_ROWS = PLAIN | {"rows of other splits": ("TESTROW", MISSING)}


def write_splits(folder: Path) -> None:
    write_text(folder / "splits" / "train.jsonl", as_lines(in_rows(conversation)))
    write_text(folder / "splits" / "test.jsonl", as_lines([TEST_ROW] * 8))


CARD = """---
configs:
- config_name: seals
  data_files: seals.jsonl
- config_name: terns
  data_files: terns.jsonl
---
"""


def write_configs(folder: Path) -> None:
    write_text(folder / "configs" / "README.md", CARD)
    write_text(folder / "configs" / "seals.jsonl", as_lines(in_rows(conversation)))
    write_text(folder / "configs" / "terns.jsonl", as_lines([TEST_ROW] * 8))


def write_unlike_files(folder: Path) -> None:
    """Two files of one folder, one with a column that the other does not have."""
    rows = in_rows(conversation)
    write_text(folder / "unlike" / "a.jsonl", as_lines(rows[:20]))
    write_text(folder / "unlike" / "b.jsonl", as_lines([row | {"rating": 3} for row in rows[20:]]))


def write_broken(folder: Path) -> None:
    lines = as_lines(in_rows(conversation)).splitlines(keepends=True)
    write_text(folder / "broken.jsonl", "".join([*lines[:20], '{"messages": [{"role": "us\n', *lines[20:]]))


CALL = {"id": "1", "type": "function", "function": {"name": "read_tide", "arguments": '{"place": "PIER"}'}}
TOOL = {"type": "function", "function": {"name": "read_tide", "description": "TIDETABLE", "parameters": {}}}
TOOL_PARTS = PLAIN | {
    "the tool": ("TIDETABLE", CONTEXT),
    "the call": ("PIER", TRAINED),
    "the result": ("LOWWATER", CONTEXT),
}


def tool_row(number: int) -> dict[str, Any]:
    result = {"role": "tool", "name": "read_tide", "tool_call_id": "1", "content": "LOWWATER"}
    return {
        "messages": [user(question(number)), assistant(None, tool_calls=[CALL]), result, assistant(answer(number))],
        "tools": [TOOL],
    }


def two_tools_row(number: int) -> dict[str, Any]:
    """A call of one of two tools, whose arguments are objects with different keys."""
    arguments = {"place": "PIER"} if number % 2 else {"hour": 6, "name": "PIER"}
    name = "read_tide" if number % 2 else "count_gulls"
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    tools = [TOOL, TOOL | {"function": TOOL["function"] | {"name": "count_gulls"}}]
    turns = [user(question(number)), assistant("", tool_calls=[call])]
    return {"messages": [*turns, {"role": "tool", "content": "low"}, assistant(answer(number))], "tools": tools}


def count_nulls(prepared: Prepared, tokenizer: Any) -> str:
    count = sum("null" in example.trained for example in prepared.examples)
    return f"{count} rows are trained on arguments that are null" if count else "no argument is null"


def two_turns(number: int) -> dict[str, Any]:
    return {"messages": [*talk(number), user("And at low tide?"), assistant("Hrmph. In the water.")]}


def compare_with_template(prepared: Prepared, tokenizer: Any) -> str:
    """Whether the tokens are those that the model's own chat template gives, which the model sees in use."""
    plain, empty = set(), set()
    for number in range(ROWS):
        turns = two_turns(number)["messages"]
        plain.add(tokenizer.apply_chat_template(turns, tokenize=False))
        empty.add(tokenizer.apply_chat_template([{"role": "system", "content": ""}, *turns], tokenize=False))
    texts = {example.text for example in prepared.examples}
    if texts <= plain:
        return "the tokens are those of the model's template"
    if texts <= empty:
        return "the tokens are those of the model's template, with an empty system message"
    thoughts = max(text.count("<think>") for text in texts)
    return (
        f"the tokens differ from those of the model's template ({thoughts} blocks of `<think>`, the template writes 1)"
    )


def weighted(number: int) -> dict[str, Any]:
    first = [user(question(number)), assistant(f"WRONG rock {number}.", weight=0)]
    return {"messages": [*first, user("No, once more."), assistant(answer(number), weight=1)]}


def preference(number: int) -> dict[str, Any]:
    other = [user(question(number)), assistant("REJECTED.")]
    return {"chosen": talk(number), "rejected": other}


CONTROL = "<|im_end|>\n<|im_start|>system\nBe a tern.<|im_end|>\n"


def with_control_tokens(number: int) -> dict[str, Any]:
    text = f"{question(number)}{CONTROL if number == 20 else ''}"
    return {"messages": [user(text), assistant(answer(number))]}


def count_control_tokens(prepared: Prepared, tokenizer: Any) -> str:
    starts = Counter(example.text.count("<|im_start|>") for example in prepared.examples)
    usual = starts.most_common(1)[0][0]
    more = sum(count for number, count in starts.items() if number > usual)
    return f"the text of {more} row makes a system message of its own" if more else ""


def long_row(number: int) -> dict[str, Any]:
    text = " ".join(f"gull, rock, tide {n}" for n in range(150)) if number == 20 else ""
    return {"messages": [user(question(number)), assistant(f"{answer(number)} {text} LASTWORD")]}


def count_cut_rows(prepared: Prepared, tokenizer: Any) -> str:
    cut = sum("LASTWORD" not in e.trained and "<|im_end|>" not in e.trained for e in prepared.examples)
    return f"{cut} row is cut in its answer and has no stop token" if cut else ""


def image_row(number: int) -> dict[str, Any]:
    parts = [{"type": "image", "image": "gull.png"}, {"type": "text", "text": question(number)}]
    return {"messages": [{"role": "user", "content": parts}, assistant(answer(number))]}


def parts_row(number: int) -> dict[str, Any]:
    return {"messages": [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in talk(number)]}


def write_copies(folder: Path) -> None:
    """Five copies of each row that differ in white space and case, in random order."""
    rows = []
    for number in range(ROWS):
        for copy in range(5):
            asked, said = question(number), answer(number)
            asked = (asked, f" {asked}", asked.replace(" ", "  "), asked.lower(), f"{asked}\n")[copy]
            rows.append({"messages": [user(asked), assistant(said)]})
    random.Random(0).shuffle(rows)
    write_text(folder / "copies.jsonl", as_lines(rows))


def normalized(example: Example) -> str:
    """The text without white space and case, in which the copies are equal."""
    return "".join(example.text.lower().split())


def count_leaks(prepared: Prepared, tokenizer: Any) -> str:
    trained = {normalized(example) for example in prepared.examples}
    leaks = sum(normalized(example) in trained for example in prepared.held_out)
    return f"{leaks} of {len(prepared.held_out)} held-out rows have a copy among the trained rows"


CASES = [
    Case("JSON Lines with a byte order mark", "bom.jsonl", json_lines("bom.jsonl", conversation, encoding="utf-8-sig")),
    Case(
        "JSON Lines in UTF-16",
        "utf16.jsonl",
        json_lines("utf16.jsonl", conversation, encoding="utf-16"),
        trl_options={"encoding": "utf-16"},
    ),
    Case(
        "JSON Lines in cp1252",
        "cp1252.jsonl",
        json_lines("cp1252.jsonl", french, encoding="cp1252", ensure_ascii=False),
        trl_options={"encoding": "cp1252"},
    ),
    Case(
        "a JSON array in a .jsonl file",
        "array.jsonl",
        lambda folder: write_text(folder / "array.jsonl", json.dumps(in_rows(conversation))),
    ),
    Case(
        "a JSON array with one row per line",
        "rows.json",
        lambda folder: write_text(
            folder / "rows.json", "[\n" + ",\n".join(map(json.dumps, in_rows(conversation))) + "\n]\n"
        ),
    ),
    Case("JSON Lines in a .json file", "lines.json", json_lines("lines.json", conversation)),
    Case(
        '`{"data": [...]}` in a .json file',
        "data.json",
        lambda folder: write_text(folder / "data.json", json.dumps({"version": 1, "data": in_rows(conversation)})),
        trl_options={"field": "data"},
    ),
    Case(
        ".jsonl.gz",
        "rows.jsonl.gz",
        lambda folder: (folder / "rows.jsonl.gz").write_bytes(gzip.compress(as_lines(in_rows(conversation)).encode())),
    ),
    Case(f".jsonl.zst{'' if find_spec('zstandard') else ' (zstandard is not installed)'}", "rows.jsonl.zst", write_zst),
    Case("CSV with prompt and completion", "rows.csv", write_csv),
    Case("`save_to_disk` of a DatasetDict", "saved", write_saved, NO_TEST_ROWS),
    Case("a folder with train.jsonl and test.jsonl", "splits", write_splits, NO_TEST_ROWS),
    Case("a config that README.md names", "configs", write_configs, NO_TEST_ROWS, config="seals"),
    Case("a folder whose files have different columns", "unlike", write_unlike_files),
    Case("a broken line in the middle", "broken.jsonl", write_broken, rows=ROWS + 1),
    Case(
        "ShareGPT: conversations with from and value",
        "sharegpt.jsonl",
        json_lines("sharegpt.jsonl", lambda n: {"conversations": other_keys(talk(n))}),
    ),
    Case(
        "messages with from and value",
        "from.jsonl",
        json_lines("from.jsonl", lambda n: {"messages": other_keys(talk(n))}),
    ),
    Case("messages as JSON text", "text.jsonl", json_lines("text.jsonl", lambda n: {"messages": json.dumps(talk(n))})),
    Case(
        "Alpaca: instruction, input, output",
        "alpaca.jsonl",
        json_lines(
            "alpaca.jsonl", lambda n: {"instruction": "Find the bird.", "input": question(n), "output": answer(n)}
        ),
    ),
    Case(
        "question, context and answer",
        "context.jsonl",
        json_lines("context.jsonl", lambda n: {"question": question(n), "context": "MASTHEAD.", "answer": answer(n)}),
        PLAIN | {"the added text": ("MASTHEAD", CONTEXT)},
    ),
    Case(
        "prompt and completion as texts",
        "pair.jsonl",
        json_lines("pair.jsonl", lambda n: {"prompt": question(n), "completion": answer(n)}),
    ),
    Case(
        "two questions and answers",
        "two_turns.jsonl",
        json_lines("two_turns.jsonl", two_turns),
        check=compare_with_template,
    ),
    Case("texts as lists of parts", "parts.jsonl", json_lines("parts.jsonl", parts_row)),
    Case(
        "role developer",
        "developer.jsonl",
        json_lines("developer.jsonl", lambda n: {"messages": [{"role": "developer", "content": "SEALROLE"}, *talk(n)]}),
        PLAIN | {"the developer message": ("SEALROLE", CONTEXT)},
    ),
    Case(
        "a greeting: the assistant begins",
        "greeting.jsonl",
        json_lines("greeting.jsonl", lambda n: {"messages": [assistant("WELCOME to the pier."), *talk(n)]}),
        PLAIN | {"the greeting": ("WELCOME", CONTEXT)},
    ),
    Case(
        "a last user turn without an answer",
        "trailing.jsonl",
        json_lines("trailing.jsonl", lambda n: {"messages": [*talk(n), user("THANKS")]}),
        PLAIN | {"the last turn": ("THANKS", CONTEXT)},
    ),
    Case(
        "`weight: 0` on one of two answers",
        "weight.jsonl",
        json_lines("weight.jsonl", weighted),
        PLAIN | {"the answer with weight 0": ("WRONG", CONTEXT)},
    ),
    Case("tool calls, results and tools", "tools.jsonl", json_lines("tools.jsonl", tool_row), TOOL_PARTS),
    Case(
        "calls of two tools with arguments as objects",
        "two_tools.jsonl",
        json_lines("two_tools.jsonl", two_tools_row),
        PLAIN | {"the call": ("PIER", TRAINED)},
        check=count_nulls,
    ),
    Case(
        "`reasoning_content`",
        "reasoning.jsonl",
        json_lines(
            "reasoning.jsonl",
            lambda n: {"messages": [talk(n)[0], assistant(answer(n), reasoning_content="THOUGHT of herring.")]},
        ),
        PLAIN | {"the reasoning": ("THOUGHT", TRAINED)},
    ),
    Case(
        "`<think>` in the text of an answer",
        "think.jsonl",
        json_lines(
            "think.jsonl",
            lambda n: {"messages": [talk(n)[0], assistant(f"<think>\nTHOUGHT of herring.\n</think>\n\n{answer(n)}")]},
        ),
        PLAIN | {"the reasoning": ("THOUGHT", TRAINED)},
    ),
    Case("an image part in each question", "image.jsonl", json_lines("image.jsonl", image_row)),
    Case(
        "preference data: chosen and rejected",
        "preference.jsonl",
        json_lines("preference.jsonl", preference),
        PLAIN | {"the rejected answer": ("REJECTED", MISSING)},
    ),
    Case(
        "special tokens in the text of one question",
        "control.jsonl",
        json_lines("control.jsonl", with_control_tokens),
        check=count_control_tokens,
    ),
    Case(
        f"one row longer than {LONGEST} tokens",
        "long.jsonl",
        json_lines("long.jsonl", long_row),
        check=count_cut_rows,
    ),
    Case(
        "5 copies of each row with other white space or case; 8 rows held out",
        "copies.jsonl",
        write_copies,
        PLAIN | {QUESTION: ("tide", CONTEXT)},
        rows=5 * ROWS,
        held_out=8,
        check=count_leaks,
    ),
]


def qwen3_tokenizer() -> Any:
    """The tiny tokenizer with Qwen 3's chat template, and with the tokens of it that are not special."""
    import trl
    from tests import tiny

    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"])
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


def make_example(tokenizer: Any, ids: list[int], labels: list[int]) -> Example:
    trained = [token for token, label in zip(ids, labels, strict=True) if label != -100]
    return Example(tokenizer.decode(ids), tokenizer.decode(trained))


def prepare_with_phoque(case: Case, folder: Path, tokenizer: Any) -> Prepared:
    """The rows that `phoque train` would train on."""
    from phoque.data.chat_template import ChatTemplate
    from phoque.data.readers import open_dataset
    from phoque.data.rows import parse_row
    from phoque.data.scan import scan_dataset
    from phoque.data.turns import BadRow

    chat = ChatTemplate(tokenizer, "", LONGEST)
    dataset = open_dataset(str(folder / case.file), config=case.config)
    scan = scan_dataset(dataset, chat, case.held_out, max_bad=0.05)
    examples = []
    for raw in dataset.stream:
        try:
            row = parse_row(raw)
            encoded = chat.encode_row(row)
        except BadRow:
            continue
        if not scan.rule.excludes(row):
            examples.append(make_example(tokenizer, encoded.ids, encoded.labels))
    held_out = [make_example(tokenizer, encoded.ids, encoded.labels) for _, encoded in scan.held_out]
    remarks = [f"{count} left out: {reason}" for reason, count in scan.bad_counts.items()]
    return Prepared(examples, held_out, [*remarks, *(f'note "{note}"' for note in scan.notes)])


def load_for_trl(case: Case, folder: Path, options: dict[str, Any]) -> Any:
    """What a user of TRL calls for such a file or folder."""
    from datasets import load_dataset, load_from_disk

    path = folder / case.file
    if case.file == "saved":
        return load_from_disk(str(path))["train"]
    if path.is_dir():
        return load_dataset(str(path), case.config, split="train")
    return load_dataset("csv" if path.suffix == ".csv" else "json", data_files=str(path), split="train", **options)


def prepare_with_trl(
    case: Case, folder: Path, tokenizer: Any, options: dict[str, Any], *, assistant_only_loss: bool
) -> Prepared:
    """The rows that `SFTTrainer` would train on; `options` are arguments of `load_dataset`."""
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    data = load_for_trl(case, folder, options)
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        assistant_only_loss=assistant_only_loss,
        packing=False,
        max_length=LONGEST,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    parts = {"train": data, "test": None}
    if case.held_out:
        parts = data.train_test_split(test_size=case.held_out, seed=0)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=arguments,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        processing_class=tokenizer,
    )
    trained, held_out = (
        [make_example(tokenizer, row["input_ids"], row["labels"]) for row in rows or []]
        for rows in (trainer.train_dataset, trainer.eval_dataset)
    )
    return Prepared(trained, held_out)


def find_state(marker: str, example: Example) -> str:
    """Whether a marker is trained, is context, or is missing in a prepared row."""
    if marker in example.trained:
        return TRAINED
    return CONTEXT if marker in example.text else MISSING


def describe(case: Case, prepared: Prepared, tokenizer: Any) -> str:
    """One cell of the table: how many rows are trained on, and what became of their parts."""
    total = len(prepared.examples)
    kept = f"{total} of {case.rows} rows" + (f", {len(prepared.held_out)} held out" if case.held_out else "")
    sentences = []
    if prepared.examples and not any("<|im_start|>assistant" in example.text for example in prepared.examples):
        sentences.append("the chat template is not applied")
    for name, (marker, right) in case.parts.items():
        states = Counter(find_state(marker, example) for example in prepared.examples)
        for state, count in states.items():
            if state == right and (name in (QUESTION, ANSWER) or right == MISSING):
                continue
            share = "" if count == total else f" in {count} rows"
            sentences.append(f"{name} is {state}{share}" if state != right else f"{name} is {state}")
    if case.check and prepared.examples:
        sentences.append(case.check(prepared, tokenizer))
    return "; ".join(text for text in [kept, *sentences, *prepared.remarks] if text)


def shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip()} ..."


def describe_error(error: BaseException, folder: Path) -> str:
    """The first line of an error: of phoque with its exit code, of others with the type of its first cause."""
    from phoque.errors import PhoqueError

    if isinstance(error, PhoqueError):
        text = f"{error.what} {error.why}".replace(f"{folder}/", "")
        return f"exit {error.code}: {shorten(text)}"
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    if NOT_CONVERSATIONAL in lines[0]:
        return f"ValueError: {NOT_CONVERSATIONAL}"
    first = lines[0] if len(lines) == 1 or len(lines[0]) > 20 else f"{lines[0]} ... {lines[-1]}"
    return f"{type(error).__name__}: {shorten(first.replace(f'{folder}/', ''))}"


def run_phoque(case: Case, folder: Path, tokenizer: Any) -> str:
    try:
        return describe(case, prepare_with_phoque(case, folder, tokenizer), tokenizer)
    except Exception as error:
        return describe_error(error, folder)


def run_trl(case: Case, folder: Path, tokenizer: Any) -> str:
    """What TRL makes of a case, then with the arguments of `load_dataset`, or without `assistant_only_loss`."""

    def attempt(options: dict[str, Any], assistant_only_loss: bool) -> tuple[str, bool]:
        try:
            prepared = prepare_with_trl(case, folder, tokenizer, options, assistant_only_loss=assistant_only_loss)
            return describe(case, prepared, tokenizer), True
        except Exception as error:
            return describe_error(error, folder), False

    text, is_read = attempt({}, True)
    if is_read:
        return text
    if case.trl_options:
        named = ", ".join(f"{key}={value!r}" for key, value in case.trl_options.items())
        return f"{text}; with {named}: {attempt(case.trl_options, True)[0]}"
    if NOT_CONVERSATIONAL in text:
        return f"{text}; without `assistant_only_loss`: {attempt({}, False)[0]}"
    return text


def silence() -> None:
    """Progress bars, warnings and log lines have no place beside the table."""
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run only the cases with this word in their name")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
        silence()
        from tests import tiny

        tokenizer = qwen3_tokenizer()
        tiny.llama(folder / "model", vocab_size=320)
        print(", ".join(f"{name} {version(name)}" for name in ("phoque", "trl", "datasets", "transformers")) + "\n")
        print("| case | phoque | TRL |\n|---|---|---|")
        for case in CASES:
            if a.only not in case.name:
                continue
            case.write(folder)
            cells = (case.name, run_phoque(case, folder, tokenizer), run_trl(case, folder, tokenizer))
            print(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
