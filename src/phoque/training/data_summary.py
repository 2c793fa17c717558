"""What a run says about its data: how rows were read and packed, what was left out, and why."""

import statistics

from phoque.console import MAX_LISTED, Console, describe_counts, shorten, shorten_list
from phoque.data.readers import Dataset
from phoque.data.scan import MANY_SIMILAR, DatasetScan
from phoque.settings.train import TrainSettings
from phoque.training.prepare import conversations_per_step, packing_for, rows_per_step

MANY_EPOCHS = 20  # above it, a run without --keep-best or --early-stop is warned of
MAX_BATCH_RATIO = 1.25  # conversations per step, relative to --batch-size, above which it is said


def report_scan(scan: DatasetScan, dataset: Dataset, s: TrainSettings, console: Console) -> None:
    """Print the summary of a scan, and a warning for everything that is not used as it stands in the data."""
    summary = scan.summary()
    console.say(f"data {dataset.name}: {describe_schemas(scan)}; held out: {describe_held_out(scan, s)}")
    if len(scan.sources) > 1:
        console.say(f"  sources: {describe_counts(scan.sources)}")
    others = [name for name in dataset.splits if name != dataset.split]
    if others:
        console.say(f"  split {dataset.split}; also there: {', '.join(others)}")
    console.say(
        f"  {summary['tokens']['mean']:.0f} tokens per conversation, "
        f"{scan.trained_tokens / sum(scan.lengths):.0%} of them trained on; "
        f"{s.max_steps} steps of {s.batch_size} conversations are {count_epochs(s, scan):.1f} epochs"
    )
    if s.packing == "budget":
        packing = packing_for(s, scan, static=True)
        count, conversations = rows_per_step(s, packing), conversations_per_step(s, scan)
        rows = f"{count} packed rows" if count > 1 else "one packed row"
        console.say(
            f"  each step trains on {rows} of {packing.tokens:,} tokens, {conversations:.1f} conversations on average"
        )
        if conversations > MAX_BATCH_RATIO * s.batch_size:
            console.warn(
                f"a row must hold the longest conversation ({packing.longest:,} tokens), so a step trains on about "
                f"{conversations:.0f} conversations instead of {s.batch_size}; lower --max-length, raise --batch-size, "
                "or use --packing exact"
            )
    shortest, _, median, _, _, longest = summary["tokens"]["quantiles"]
    console.say(f"  conversations of {shortest} to {longest} tokens, median {median}{_describe_scores(scan.scores)}")
    for text in list_data_notes(scan, dataset):
        console.say(f"  {text}")
    for text in list_data_problems(scan, s):
        console.warn(text)
    if not scan.complete:
        console.say(f"  the first {scan.rows:,} rows were scanned; the rest are checked while training reads them")


def list_data_notes(scan: DatasetScan, dataset: Dataset) -> list[str]:
    """What was changed in rows that are used, and what has no part in training."""
    notes = [f"{count_rows(count)}: {note} (first: {scan.examples[note]})" for note, count in scan.notes.most_common()]
    if excluded := scan.copies + (scan.similar if scan.rule.sketches else 0):
        notes.append(f"{count_rows(excluded)} that copy or nearly repeat a held-out row are not trained on")
    if dataset.other_files:
        notes.append(f"files that belong to no split: {shorten_list(dataset.other_files)}")
    if dataset.stream.unused_columns:
        notes.append(f"columns that are not used: {shorten_list([*dataset.stream.unused_columns])}")
    return notes


def list_data_problems(scan: DatasetScan, s: TrainSettings) -> list[str]:
    """Rows that are left out, by reason, keys that are not understood, and results that will mean little."""
    problems = [
        f"{count_rows(bad['count'])} left out: {reason} (first: {', '.join(bad['first'])})"
        for reason, bad in scan.summary()["bad"].items()
    ]
    problems += [
        f"{count_rows(count)} with turns that have {shorten(key)!r}, which phoque does not know "
        f"(first: {scan.examples[key]})"
        for key, count in scan.unknown_keys.most_common(MAX_LISTED)
    ]
    if scan.similar > MANY_SIMILAR * scan.good:
        excluded = "are not trained on" if scan.rule.sketches else "are trained on all the same"
        problems.append(
            f"{scan.similar} of {count_rows(scan.good)} nearly repeat one of {len(scan.held_out)} held-out rows, and "
            f"{excluded}: lower --held-out-rows, or remove near-duplicates from the dataset"
        )
    epochs = count_epochs(s, scan)
    if scan.complete and epochs > MANY_EPOCHS and not (s.keep_best or s.early_stop or s.epochs):
        keep = " --keep-best" if scan.held_out else ""
        problems.append(
            f"{s.max_steps} steps read {count_rows(scan.trained_rows)} {epochs:.0f} times, and the model may learn "
            f"them by heart: use --epochs 3{keep}, or more rows"
        )
    return problems


def count_rows(count: int) -> str:
    """`1 row` or `n rows`."""
    return f"{count} row{'' if count == 1 else 's'}"


def count_epochs(s: TrainSettings, scan: DatasetScan) -> float:
    """The passes over the rows that are trained on."""
    return s.max_steps * conversations_per_step(s, scan) / max(1, scan.trained_rows)


def describe_schemas(scan: DatasetScan) -> str:
    """How the rows were read, for example: ShareGPT conversations, 40 of 40."""
    return ", ".join(f"{schema}, {count} of {scan.rows}" for schema, count in scan.schemas.most_common())


def describe_held_out(scan: DatasetScan, s: TrainSettings) -> str:
    """How many rows are held out, and where they are from."""
    if not scan.held_out and s.held_out_rows:
        return "0 rows, as a tenth of the different rows is less than one"
    return f"{len(scan.held_out)} rows" + (f" of split {s.eval_split}" if s.eval_split else "")


def _describe_scores(scores: list[float]) -> str:
    if not scores:
        return ""
    return f"; toxicity scores {min(scores):.2f} to {max(scores):.2f}, median {statistics.median(scores):.2f}"
