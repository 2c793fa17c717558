"""Conversations into packed rows: phoque's stream beside what TRL does before its first step, with the same template.

The rows are the seal's with the words of each answer in another order, with the tokenizer of Ministral that
mistral-common carries. phoque scans the first 50,000 rows (defects, held-out rows, lengths), and packs while training
goes on; it keeps the sizes of the rows for the next start, which is measured too. TRL tokenizes, packs and writes all
rows first. Each side runs in a process of its own, and memory is its peak beyond what the imports take. With --wide,
the rows are in a Parquet file with a column of 100 kB per row that nobody uses. With --processes, one process of
several prepares its packed row of each step, with and without the sizes of rows that the scan found.

Run: uv run python benchmarks/data.py [--rows 200000] [--wide | --processes 1 2 8]
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src"), str(ROOT / "benchmarks")]
from merge import forget_peak, peak  # noqa: E402

TOKENS = 2944  # of a row: what sixteen of these conversations take
LONGEST = 1024
STEP_TOKENS = 2100  # of a packed row with --processes


def write_rows(path: Path, count: int) -> None:
    """The seal's conversations over and over, no two alike; with a column of 100 kB if the file is a table."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = ({"messages": turns} for turns in make_conversations(count))
    if path.suffix == ".jsonl":
        with path.open("w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        return
    writer = None
    while batch := [row | {"html": "<p>tide</p>" * 9100} for row in islice(rows, 500)]:
        table = pa.Table.from_pylist(batch)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def make_conversations(count: int) -> Iterator[list[dict[str, str]]]:
    """The seal's conversations over and over, with the words of each last answer in another order."""
    from phoque.data.readers import BUNDLED

    seal = [json.loads(line)["messages"] for line in BUNDLED["seal"].read_text().splitlines()]
    for number in range(count):
        *turns, last = seal[number % len(seal)]
        words = last["content"].split()
        random.Random(number).shuffle(words)
        yield [*turns, last | {"content": " ".join(words)}]


def find_rows(folder: Path) -> Path:
    """The file that write_rows wrote."""
    return next(folder.glob("rows.*"))


def ministral_chat() -> Any:
    """The tokenizer of Ministral, with the template that mistral-common writes for it."""
    from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from tests import tiny

    from phoque.data.chat_template import ChatTemplate

    tokenizer = tiny.tekken()
    tokenizer.chat_template = tiny.mistral_template(generate_chat_template, TokenizerVersion.v13)
    return ChatTemplate(tokenizer, "", LONGEST)


def ours(folder: Path, count: int) -> dict[str, float]:
    """One pass of the stream that a run trains on, as fast as it comes."""
    from phoque.data.packing import Packing
    from phoque.data.readers import open_dataset
    from phoque.data.row_sizes import RowSizes, find_sizes_file
    from phoque.data.scan import scan_dataset
    from phoque.data.stream import TrainStream

    chat = ministral_chat()
    before, begun = forget_peak(), time.perf_counter()
    data = open_dataset(str(find_rows(folder)))
    file = find_sizes_file(Path(os.environ["HF_HOME"]), "rows", [], chat)
    found = scan_dataset(data, chat, 64, 0.05, sizes=RowSizes(chat, file))
    packing = Packing(16, TOKENS / 16, max(found.lengths), static=True)
    stream = TrainStream(data, chat, held_out=found.rule, packing=packing, seed=0)
    rows = iter(stream)
    next(rows)
    first = time.perf_counter() - begun
    for _ in takewhile(lambda row: stream.epoch == 0, rows):
        pass
    seconds = time.perf_counter() - begun - first
    return {
        "first": first,
        "rows": stream.rows_seen / seconds,
        "tokens": stream.tokens_seen / seconds,
        "padding": stream.padding,
        "memory": peak() - before,
    }


def trl(folder: Path, count: int) -> dict[str, float]:
    """What SFTTrainer makes of the same rows before it could take a step."""
    from datasets import load_dataset
    from tests import tiny
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    chat = ministral_chat()
    # TRL needs {% generation %} around the assistant's text; phoque finds it by itself
    branch = r"(\{%-? elif message\['role'\] == 'assistant' %\})(.*?\{\{-?[^{}]*eos_token\s*-?\}\})"
    marked = r"\1{%- generation %}\2{%- endgeneration %}"
    chat.tokenizer.chat_template = re.sub(branch, marked, chat.template, count=1, flags=re.DOTALL)
    model = LlamaForCausalLM(LlamaConfig(**tiny.SIZES | {"vocab_size": len(chat.tokenizer)}))
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        packing=True,
        max_length=TOKENS,
        assistant_only_loss=True,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        eos_token=chat.tokenizer.eos_token,
    )
    before, begun = forget_peak(), time.perf_counter()
    path = find_rows(folder)
    kind = "json" if path.suffix == ".jsonl" else "parquet"
    data = load_dataset(kind, data_files=str(path), split="train")
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=chat.tokenizer)
    seconds = time.perf_counter() - begun
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    return {
        "first": seconds,
        "rows": count / seconds,
        "tokens": sum(lengths) / seconds,
        "padding": 1 - sum(lengths) / (TOKENS * len(lengths)),
        "memory": peak() - before,
    }


def dealt(folder: Path, counts: list[int], steps: int = 320) -> None:
    """Print how long process 0 takes to prepare its row of a step, in a run of each number of processes."""
    from phoque.data.packing import Packing
    from phoque.data.readers import open_dataset
    from phoque.data.row_sizes import RowSizes
    from phoque.data.scan import scan_dataset
    from phoque.distributed.processes import Processes
    from phoque.training.dealt_rows import DealtStream

    chat, data = ministral_chat(), open_dataset(str(find_rows(folder)))
    sizes = RowSizes(chat, folder / "sizes.json")
    found = scan_dataset(data, chat, 64, 0.05, sizes=sizes)
    packing = Packing(round(STEP_TOKENS / found.mean_length), found.mean_length, max(found.lengths), static=True)
    print("| processes | with the sizes of the scan, ms per step | every row encoded, ms per step |\n|---|---|---|")
    for count in counts:
        took = []
        for known in (sizes, None):
            dealing = {"rows_per_step": count, "processes": Processes(0, count), "sizes": known}
            stream = DealtStream(data, chat, held_out=found.rule, packing=packing, seed=0, **dealing)
            begun = time.perf_counter()
            for _ in islice(stream._make_batches(), steps):  # without the thread that prepares rows ahead
                pass
            took.append(1000 * (time.perf_counter() - begun) / steps)
        print(f"| {count} | {took[0]:.1f} | {took[1]:.1f} |", flush=True)


def written(folder: Path) -> float:
    """GB of files in a folder."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e9


SIDES = {"phoque": ours, "phoque, the next start": ours, "TRL, packing": trl}


def main() -> None:
    """Run all sides and print the table of docs/benchmarks/training.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--wide", action="store_true", help="with a column of 100 kB that nobody uses")
    parser.add_argument("--processes", type=int, nargs="+", help="prepare the rows of one of so many processes")
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--folder", type=Path)
    a = parser.parse_args()
    if a.side:
        print(json.dumps(SIDES[a.side](a.folder, a.rows)))
        return
    if a.processes:
        with tempfile.TemporaryDirectory() as name:
            write_rows(Path(name) / "rows.jsonl", a.rows)
            dealt(Path(name), a.processes)
        return
    print(f"{a.rows:,} rows{' with a column of 100 kB' if a.wide else ''}\n")
    print("| | first row after, s | rows/s | tokens/s | padding | memory, GB | written, GB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / ("rows.parquet" if a.wide else "rows.jsonl"), a.rows)
        for side in SIDES:
            home = folder / f"home-{side[:3]}"
            command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--rows", str(a.rows)]
            env = os.environ | {"HF_HOME": str(home)}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {side} | {row['first']:.0f} | {row['rows']:,.0f} | {row['tokens']:,.0f} | {row['padding']:.1%} | "
                f"{row['memory'] / 1e9:.2f} | {written(home):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
