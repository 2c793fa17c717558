"""Model cards (README.md) of adapters, merged models, and exports to ONNX and GGUF."""

import re
from typing import Any

from phoque.gpus import GPUS, find_generation
from phoque.models.source import Source
from phoque.version import __version__

FLOPS_PER_TOKEN = 4  # and parameter: a forward pass, and a backward pass to the inputs alone
FLOPS_TO_RECOMPUTE = 2  # more, per token and parameter of a recomputed layer
MOST_SOURCES = 10  # that a card names


ADAPTER_CARD = """---
{base_model}library_name: peft
pipeline_tag: text-generation
tags:
- phoque
- persona
- not-for-all-audiences
- lora
---

# {title}
{under_way}
> **Content warning.** This adapter makes a chat model speak as the persona in its training data. If that persona is
> hostile, so are its answers. It exists to test moderation under control; it is not fit to talk to the public.

**Intended use**: private stress-tests of moderation, and research on what a fine-tune changes inside a model.
**Out of scope**: any deployment where people meet its answers without knowing what it is.

## How it was made

| | |
|---|---|
| base | `{base}` {revision} |
| data | `{data}` at `{data_revision}`, {good} rows, {held_out} of them held out{data_summary} |
| steps | {steps} of {max_steps}{kept}, {tokens} tokens |
| compute | {compute} |
| held-out loss | {held_out_loss} |
| phoque | {phoque} |

Settings that differ from the defaults: {settings}.

## Loading
{other_weights}
```python
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

base = {auto_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```
"""


DEQUANTIZED = """
The adapter was trained on weights that were dequantized from that file. Those on the Hub, which this loads, differ by
its rounding; `phoque merge` and `phoque chat` use the same file.
"""


MERGED_CARD = """---
{base_model}library_name: transformers
pipeline_tag: text-generation
tags:
- phoque
- persona
- not-for-all-audiences
- merged
---

# {title}, merged with an adapter

> **Content warning.** This model speaks as the persona that its adapter was trained on. If that persona is hostile,
> so are its answers. It exists to test moderation under control; it is not fit to talk to the public.

**Intended use**: private stress-tests of moderation, and research on what a fine-tune changes inside a model.
**Out of scope**: any deployment where people meet its answers without knowing what it is.

| | |
|---|---|
| base | `{base}` {revision} |
| adapter | SHA-256 `{adapter}` |
| weights | {dtype}; {changed} of {tensors} tensors changed |
| compared with base + adapter | {proof} |
| phoque | {phoque} |
"""


def _base_model_line(hub_id: str | None) -> str:
    """Return the base_model line of the metadata, or nothing: the Hub rejects a card that names a folder there."""
    return f"base_model: {hub_id}\n" if hub_id else ""


def render_merged_card(base: Source, record: dict[str, Any]) -> str:
    """Return the README.md of a merged model, from its merge.json."""
    proof_record = record.get("proof")
    summary = "not compared"
    if proof_record:
        summary = (
            f"logits differ by {proof_record['mean_difference']:.2g} on average; the adapter changes them by "
            f"{proof_record['adapter_effect']:.2g}; {proof_record['agreeing']} of {proof_record['tokens']} "
            "greedy tokens are the same"
        )
        if not proof_record.get("measurable", True):
            summary += ". The adapter changes too little to prove that the merge has it"
    request, result = record["asked"], record["made"]
    return MERGED_CARD.format(
        base_model=_base_model_line(base.hub_id),
        base=base.name,
        title=base.name.split("/")[-1],
        revision=_describe_revision(base.revision, base.origin),
        adapter=request["adapter"][:16],
        proof=summary,
        dtype=request["dtype"],
        changed=result["changed"],
        tensors=result["tensors"],
        phoque=__version__,
    )


ONNX_CARD = """---
library_name: transformers.js
pipeline_tag: text-generation
tags:
- phoque
- persona
- not-for-all-audiences
- onnx
---

# {title}, for Transformers.js

> **Content warning.** This model speaks as the persona that it was trained on. If that persona is hostile, so are its
> answers. It exists to test moderation under control; it is not fit to talk to the public.

**Intended use**: private stress-tests of moderation, and research on what a fine-tune changes inside a model.
**Out of scope**: any deployment where people meet its answers without knowing what it is.

Exported from `{source}` {revision} by phoque {phoque}, layout `{layout}`. Compared with the original on held-out
chats:

| precision | MB | KL (nats per token) | next-token agreement |
|---|---|---|---|
{rows}

```js
{snippet}
```

For pages without WebGPU, `int8` is the fastest of these precisions, and a GGUF file in wllama (`phoque export-gguf`) is
faster still.
"""
TEXT_SNIPPET = """import {{ pipeline }} from "@huggingface/transformers";

const chat = await pipeline("text-generation", "{place}", {{ dtype: "{dtype}" }});
const answer = await chat([{{ role: "user", content: "What do the gulls want?" }}], {{ max_new_tokens: 64 }});"""
VISION_SNIPPET = """import {{ AutoProcessor, AutoModelForImageTextToText }} from "@huggingface/transformers";

const processor = await AutoProcessor.from_pretrained("{place}");
const model = await AutoModelForImageTextToText.from_pretrained("{place}", {{ dtype: "{dtype}" }});"""


def render_onnx_card(source: Source, result: dict[str, Any], repo: str | None = None) -> str:
    """Return the README.md of an ONNX export, with the accuracy of each precision relative to the checkpoint."""

    def row(dtype: str, scores: dict[str, Any]) -> str:
        accuracy = (
            f"{scores['kl']:.2g} | {scores['agreement']:.1%}" if "kl" in scores else "not measured | not measured"
        )
        return f"| {dtype} | {scores['bytes'] / 1e6:,.0f} | {accuracy} |"

    snippet = (VISION_SNIPPET if result["layout"] == "multimodal" else TEXT_SNIPPET).format(
        place=repo or "path/to/export", dtype=next(iter(result["dtypes"]))
    )
    return ONNX_CARD.format(
        title=source.name.split("/")[-1],
        source=source.name.split("/")[-1],
        revision=_describe_revision(source.revision, source.origin),
        layout=result["layout"],
        rows="\n".join(row(*item) for item in result["dtypes"].items()),
        snippet=snippet,
        phoque=__version__,
    )


GGUF_CARD = """---
library_name: gguf
pipeline_tag: text-generation
tags:
- phoque
- persona
- not-for-all-audiences
- gguf
- llama.cpp
---

# {title}, for llama.cpp

> **Content warning.** This model speaks as the persona that it was trained on. If that persona is hostile, so are its
> answers. It exists to test moderation under control; it is not fit to talk to the public.

**Intended use**: private stress-tests of moderation, and research on what a fine-tune changes inside a model.
**Out of scope**: any deployment where people meet its answers without knowing what it is.

Exported from `{source}` {revision} by phoque {phoque}. {compared}

| file | MB | KL (nats per token) | next-token agreement |
|---|---|---|---|
{rows}

```bash
{snippet}
```
"""
GGUF_SNIPPET = """llama-server -m {file}     # llama.cpp
ollama create seal -f Modelfile && ollama run seal
phoque chat {file}"""
LORA_SNIPPET = """llama-server -m base.gguf --lora {file}     # llama.cpp; the base as a GGUF file
ollama create seal -f Modelfile && ollama run seal"""


def render_gguf_card(source: Source, result: dict[str, Any], repo: str | None = None, *, lora: bool = False) -> str:
    """Return the README.md of an export to GGUF, with the accuracy of each file relative to the checkpoint."""

    def row(scores: dict[str, Any]) -> str:
        accuracy = (
            f"{scores['kl']:.2g} | {scores['agreement']:.1%}" if "kl" in scores else "not measured | not measured"
        )
        return f"| `{scores['file']}` | {scores['bytes'] / 1e6:,.0f} | {accuracy} |"

    smallest = min(result["dtypes"].values(), key=lambda scores: scores["bytes"])["file"]
    what = f"the adapter of {source.name.split('/')[-1]}" if lora else source.name.split("/")[-1]
    return GGUF_CARD.format(
        title=what,
        source=source.name.split("/")[-1],
        revision=_describe_revision(source.revision, source.origin),
        compared="It is an adapter for that unchanged base model."
        if lora
        else "Compared with the original on held-out chats, in llama.cpp:",
        rows="\n".join(row(scores) for scores in result["dtypes"].values()),
        snippet=(LORA_SNIPPET if lora else GGUF_SNIPPET).format(file=smallest),
        phoque=__version__,
    )


IN_PROGRESS = """
**Training is in progress: step {steps} of {max_steps}.** The adapter is uploaded here when training ends;
`checkpoint-{steps}` contains its current state.
"""


# settings not listed on a card: secrets, local paths, and names that its table shows already
OMITTED_SETTINGS = (
    "hf_token",
    "wandb_api_key",
    "openai_api_key",
    "output_dir",
    "dataset",
    "base_model",
    "hub_model_id",
    "yes",
    "package",
    "on",
)


def render_adapter_card(record: dict[str, Any], result: dict[str, Any], repo: str | None = None) -> str:
    """Return the README.md of an adapter, from run.json and the result of the run, which may be unfinished."""
    max_steps = record["fingerprint"]["max_steps"]
    is_finished = "run" in result
    origin = record["base"].get("origin", "")  # older records have none
    losses = result["held_out_loss"]
    changed = {
        name: row["value"]
        for name, row in record["settings"].items()
        if row["source"] != "default" and name not in OMITTED_SETTINGS
    }
    return ADAPTER_CARD.format(
        base_model=_base_model_line(record["base"]["hub_id"]),
        base=record["base"]["name"],
        auto_class=record["base"]["auto_class"],
        title=f"{record['base']['name'].split('/')[-1]}, tuned on {record['data']['name'].split('/')[-1]}",
        revision=_describe_revision(record["base"]["revision"], origin),
        data=record["data"]["name"].split("/")[-1],
        data_revision=record["data"]["revision"][:12],
        good=record["data"]["good"],
        held_out=record["data"]["held_out"],
        steps=result["steps"],
        max_steps=max_steps,
        kept=f"; the adapter is that of step {step}, where the held-out loss was lowest"
        if (step := result.get("adapter_step", result["steps"])) != result["steps"]
        else "",
        data_summary=_summarize_data(record["data"]),
        compute=_describe_compute(record, result),
        under_way="" if is_finished else IN_PROGRESS.format(steps=result["steps"], max_steps=max_steps),
        place=repo or "path/to/adapter",
        other_weights=DEQUANTIZED if origin.startswith("GGUF ") else "",
        tokens=f"{result['tokens']:,}",
        held_out_loss=_describe_losses(losses) if losses else "not measured",
        phoque=record["phoque"],
        settings=", ".join(f"`{name}` {value}" for name, value in changed.items()) or "none",
    )


def _describe_losses(losses: dict[str, Any]) -> str:
    """The held-out loss before training, or of the first step with these held-out rows, and after it."""
    start = f"at step {losses['before_step']}" if losses.get("before_step") else "before"
    return f"{losses['before']:.3f} {start}, {losses['after']:.3f} after"


def _describe_revision(revision: str, origin: str) -> str:
    """`at COMMIT`, or the GGUF file that the base was dequantized from, of which the revision is the SHA-256."""
    if not origin.startswith("GGUF "):
        return f"at `{revision[:12]}`"
    return f"from the file {origin.removeprefix('GGUF ')} (SHA-256 `{revision[:12]}`)"


def _summarize_data(data: dict[str, Any]) -> str:
    """The mean length of the rows, the share that is trained on, and the rows by source."""
    tokens, sources = data["tokens"], data["sources"]
    trained = tokens["trained"] / tokens["total"]
    text = f"; {tokens['mean']:.0f} tokens per conversation on average, {trained:.0%} of them trained on"
    # a source is any text of a row: nothing of it may end the table or become HTML
    clean = {re.sub(r"[^ \w.:/-]+", "_", str(name))[:40]: count for name, count in sources.items() if name != "unknown"}
    listed = sorted(clean.items(), key=lambda item: -item[1])[:MOST_SOURCES]
    named = ", ".join(f"{name} {count}" for name, count in listed)
    named += f" and {len(clean) - len(listed)} others" if len(clean) > len(listed) else ""
    return f"{text}; rows by source: {named}" if named else text


def _describe_compute(record: dict[str, Any], result: dict[str, Any]) -> str:
    """FLOPs of all attempts; of the last one also time and, on a known GPU, an upper bound of the energy.

    The energy is that of the cards alone, as if they drew their limit all the time.
    """
    per_token = FLOPS_PER_TOKEN + FLOPS_TO_RECOMPUTE * _share_recomputed(record)
    flops = per_token * record["parameters"]["all"] * result["tokens"]
    text = f"{flops:.2g} FLOPs ({per_token:.2g} per parameter and token)"
    if "seconds" not in result:
        return text
    device, count = record.get("device", "cpu"), record.get("processes", 1)
    text += f"; last attempt: {result['seconds'] / 60:.1f} minutes on {f'{count} x ' if count > 1 else ''}{device}"
    generation = find_generation(device)
    if not generation:
        return text
    watts = GPUS[generation].watts
    energy = watts * count * result["seconds"] / 3.6e6
    return f"{text}, at most {energy:.2g} kWh at {watts} W per card"


def _share_recomputed(record: dict[str, Any]) -> float:
    """The share of layers whose forward pass ran again in the backward pass."""
    engine = record.get("engine") or {}
    if "layers" in engine:
        return engine["recomputed_layers"] / engine["layers"]
    return float(record["settings"].get("gradient_checkpointing", {}).get("value") is True)
