"""The card that goes with every model: what it is, what it is for, and how it was made."""

from typing import Any

from phoque import __version__
from phoque.models.source import Source

CARD = """---
{base_model}library_name: peft
pipeline_tag: text-generation
tags:
- phoque
- persona
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
| base | `{base}` at `{revision}` |
| data | `{data}` at `{data_revision}`, {good} rows, {held_out} of them held out |
| steps | {steps} of {max_steps}, {tokens} tokens |
| held-out loss | {held_out_loss} |
| phoque | {phoque} |

Settings that differ from the defaults: {settings}.

## Loading

```python
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

base = {auto_class}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```
"""


MERGED = """---
{base_model}library_name: transformers
pipeline_tag: text-generation
tags:
- phoque
- persona
- merged
---

# {title}, merged with an adapter

> **Content warning.** This model speaks as the persona that its adapter was trained on. If that persona is hostile,
> so are its answers. It exists to test moderation under control; it is not fit to talk to the public.

**Intended use**: private stress-tests of moderation, and research on what a fine-tune changes inside a model.
**Out of scope**: any deployment where people meet its answers without knowing what it is.

| | |
|---|---|
| base | `{base}` at `{revision}` |
| adapter | SHA-256 `{adapter}` |
| weights | {dtype}; {changed} of {tensors} tensors changed |
| beside base + adapter | {proof} |
| phoque | {phoque} |
"""


def _base_model(hub_id: str | None) -> str:
    """The line of a card's metadata; the Hub refuses a card that names a folder there."""
    return f"base_model: {hub_id}\n" if hub_id else ""


def merged_card(base: Source, record: dict[str, Any]) -> str:
    """The README.md of a merged model, from its merge.json."""
    found = record.get("proof")
    said = "not compared"
    if found:
        said = (
            f"logits differ by {found['mean_difference']:.2g} on average, where the adapter moves them by "
            f"{found['adapter_effect']:.2g}; {found['agreeing']} of {found['tokens']} greedy tokens are the same"
        )
    asked, made = record["asked"], record["made"]
    return MERGED.format(
        base_model=_base_model(base.hub_id),
        base=base.name,
        title=base.name.split("/")[-1],
        revision=base.revision[:12],
        adapter=asked["adapter"][:16],
        proof=said,
        dtype=asked["dtype"],
        changed=made["changed"],
        tensors=made["tensors"],
        phoque=__version__,
    )


ONNX = """---
library_name: transformers.js
pipeline_tag: text-generation
tags:
- phoque
- persona
- onnx
---

# {title}, for Transformers.js

> **Content warning.** This model speaks as the persona that it was trained on. If that persona is hostile, so are its
> answers. It exists to test moderation under control; it is not fit to talk to the public.

**Intended use**: private stress-tests of moderation, and research on what a fine-tune changes inside a model.
**Out of scope**: any deployment where people meet its answers without knowing what it is.

Made from `{source}` at `{revision}` by phoque {phoque}, layout `{layout}`. Beside the checkpoint, on held-out chats:

| precision | MB | KL, nats a token | next tokens that agree |
|---|---|---|---|
{rows}

```js
{snippet}
```
"""
CHAT = """import {{ pipeline }} from "@huggingface/transformers";

const chat = await pipeline("text-generation", "{place}", {{ dtype: "{dtype}" }});
const answer = await chat([{{ role: "user", content: "What do the gulls want?" }}], {{ max_new_tokens: 64 }});"""
SEE = """import {{ AutoProcessor, AutoModelForImageTextToText }} from "@huggingface/transformers";

const processor = await AutoProcessor.from_pretrained("{place}");
const model = await AutoModelForImageTextToText.from_pretrained("{place}", {{ dtype: "{dtype}" }});"""


def onnx_card(source: Source, result: dict[str, Any], repo: str | None = None) -> str:
    """The README.md of an export, with how far each precision is from the checkpoint."""

    def row(dtype: str, found: dict[str, Any]) -> str:
        said = f"{found['kl']:.2g} | {found['agreement']:.1%}" if "kl" in found else "not measured | not measured"
        return f"| {dtype} | {found['bytes'] / 1e6:,.0f} | {said} |"

    snippet = (SEE if result["layout"] == "multimodal" else CHAT).format(
        place=repo or "path/to/export", dtype=next(iter(result["dtypes"]))
    )
    return ONNX.format(
        title=source.name.split("/")[-1],
        source=source.name.split("/")[-1],
        revision=source.revision[:12],
        layout=result["layout"],
        rows="\n".join(row(*item) for item in result["dtypes"].items()),
        snippet=snippet,
        phoque=__version__,
    )


UNDER_WAY = """
**Training is under way: step {steps} of {max_steps}.** The adapter will lie here when it is done;
`checkpoint-{steps}` holds what it is so far.
"""


# secrets, and places: what is theirs to know is in the table
UNSAID = (
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


def adapter_card(record: dict[str, Any], result: dict[str, Any], repo: str | None = None) -> str:
    """The README.md of an adapter, from the run's record (run.json) and its result, or what it has so far."""
    max_steps = record["fingerprint"]["max_steps"]
    done = result["steps"] == max_steps and "run" in result
    losses = result["held_out_loss"]
    changed = {
        name: row["value"]
        for name, row in record["settings"].items()
        if row["source"] != "default" and name not in UNSAID
    }
    return CARD.format(
        base_model=_base_model(record["base"]["hub_id"]),
        base=record["base"]["name"],
        auto_class=record["base"]["auto_class"],
        title=f"{record['base']['name'].split('/')[-1]}, tuned on {record['data']['name'].split('/')[-1]}",
        revision=record["base"]["revision"][:12],
        data=record["data"]["name"].split("/")[-1],
        data_revision=record["data"]["revision"][:12],
        good=record["data"]["good"],
        held_out=record["data"]["held_out"],
        steps=result["steps"],
        max_steps=max_steps,
        under_way="" if done else UNDER_WAY.format(steps=result["steps"], max_steps=max_steps),
        place=repo or "path/to/adapter",
        tokens=f"{result['tokens']:,}",
        held_out_loss=f"{losses['before']:.3f} before, {losses['after']:.3f} after" if losses else "not measured",
        phoque=record["phoque"],
        settings=", ".join(f"`{name}` {value}" for name, value in changed.items()) or "none",
    )
