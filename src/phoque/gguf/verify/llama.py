"""Level `llama.cpp`: llama.cpp loads the file, splits texts as the model does, and computes what it computes."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError

from phoque.checks import CheckFailed, Verdict
from phoque.data.chat_template import ChatTemplate
from phoque.data.readers import open_dataset
from phoque.data.rows import parse_row
from phoque.data.template_renderer import TemplateRenderer
from phoque.data.turns import BadRow
from phoque.gguf.llama_cpp_model import shared_length
from phoque.gguf.reader import GgufFile
from phoque.gguf.verify.files import QUESTION, find_stop_token, render
from phoque.hub.client import Hub
from phoque.inference.generate import generate_greedy
from phoque.inference.likelihood import sum_kl
from phoque.models.config import load_tokenizer
from phoque.models.load import load_model
from phoque.models.source import Source
from phoque.models.stop_tokens import stop_at_template
from phoque.settings.environment import environment_without_secrets

LEVEL = "llama.cpp"
PROMPTS = ("What do the gulls want from you today?", "How do I learn to swim in the harbour?")
CHATS = 1000  # rendered conversations whose tokens are compared
NEW_TOKENS = 64
TIMEOUT_S = 1800.0
# nats per token; rounding to so many bits explains no more
MAX_KL = {"f32": 1e-4, "f16": 1e-3, "bf16": 1e-2, "q8_0": 0.05, "q6_k": 0.1, "q5_k_m": 0.2, "q4_k_m": 0.4}
MAX_KL_OTHER = 1.0


@dataclass(frozen=True)
class Expected:
    """What a file must give: tokens of texts, logits of prompts, greedy answers; `name` says whose they are."""

    name: str
    texts: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)


def read_reference(source: Source, chats: str, hub: Hub) -> Expected:
    """Run the original model: the tokens of up to 1,000 rendered conversations, logits and answers to two prompts."""
    tokenizer = load_tokenizer(source)
    texts = render_chats(tokenizer, chats, hub)
    ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    template = ChatTemplate(tokenizer, "template", 1 << 20)
    prompts = [template.prompt_ids(text, None) for text in PROMPTS]
    model = stop_at_template(load_model(source, "fp32", on=torch.device("cpu")), tokenizer)
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]
    answers = [generate_greedy(model, torch.tensor([prompt]), NEW_TOKENS) for prompt in prompts]
    return Expected("the reference model", texts, ids, prompts, logits, answers)


def render_chats(tokenizer: Any, chats: str, hub: Hub) -> list[str]:
    """Conversations by the model's template, each turn of them also as the last one, up to CHATS texts."""
    renderer, texts = TemplateRenderer(tokenizer), []
    for raw in islice(open_dataset(chats, "train", None, hub).stream, CHATS):
        try:
            messages = [{"role": t["role"], "content": t["content"]} for t in parse_row(raw).messages]
            for end in range(1, len(messages) + 1):
                is_question = messages[end - 1]["role"] == "user"
                texts.append(renderer.render(messages[:end], add_generation_prompt=is_question))
        except (BadRow, TemplateError):  # a template may refuse a conversation; `phoque train --dry-run` says why
            continue
        if len(texts) >= CHATS:
            break
    return texts[:CHATS]


def check_llama(file: GgufFile, modules: Path, expected: Expected | None, verdict: Verdict) -> Expected | None:
    """Add this level's checks for one file; return what the next file is compared with, if anything.

    Without a reference the file's own template and tokens are all there is, and the first file is the reference.
    """
    name, dtype = file.path.name, file.precision
    answer: dict[str, Any] = {}
    logits: list[np.ndarray] = []
    with verdict.check(LEVEL, f"{name}: llama.cpp loads it") as notes:
        texts = expected.texts if expected else [render(file, QUESTION, add_generation_prompt=True)]
        prompts = expected.prompts if expected else texts
        ends = [file.tokens.index(find_stop_token(file))]
        answer, logits = ask_llama(file.path, modules, texts=texts, prompts=prompts, ends=ends)
        notes.append(f"in {answer['load_s']:.1f} s, {answer['tokens_per_s']:.3g} tokens per second")
    if not answer:
        return expected
    with verdict.check(LEVEL, f"{name}: it stops at the token that ends its answers") as notes:
        if not all(answer["is_end"]):
            raise CheckFailed(f"llama.cpp does not stop at {find_stop_token(file)!r}, so it would talk on")
        notes.append(f"{sum(answer['ended'])} of {len(answer['ended'])} answers ended within {NEW_TOKENS} tokens")
    if expected and expected.ids:
        with verdict.check(LEVEL, f"{name}: its tokens are those of {expected.name}") as notes:
            notes.append(_compare_tokens(expected, answer["ids"]))
    else:
        verdict.skip(LEVEL, f"{name}: its tokens are those of the model", "there is no --reference to compare with")
    mine = Expected(f"{name}, the most precise here", texts, [], answer["prompts"], logits, answer["answers"])
    if expected:
        with verdict.check(LEVEL, f"{name}: logits and answers match {expected.name}") as notes:
            notes.append(_compare_answers(mine, expected, dtype, verdict, name))
    else:
        verdict.skip(LEVEL, f"{name}: logits and answers match the model", "there is no --reference to compare with")
    return expected or mine


def ask_llama(
    file: Path,
    modules: Path,
    *,
    texts: Sequence[str] = (),
    prompts: Sequence[list[int] | str] = (),
    ends: Sequence[int] = (),
    tokens: int = NEW_TOKENS,
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Run a file in llama.cpp, in a process of its own; return the answer and the logits of each prompt.

    Prompts are token ids, or texts that the file's own tokenizer splits. Raises CheckFailed with llama.cpp's reason, or
    if the process ends.
    """
    longest = max(
        (len(p.encode() if isinstance(p, str) else p) for p in prompts), default=0
    )  # a token is a byte or more
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "modules": str(modules),
            "file": str(file.absolute()),
            "texts": list(texts),
            "prompts": list(prompts),
            "ends": list(ends),
            "tokens": tokens,
            "length": longest + tokens + 8,
            "logits": str(Path(folder) / "logits.npz"),
        }
        command = [sys.executable, "-m", "phoque.gguf.verify.llama_process"]
        try:
            process = subprocess.run(
                command,
                input=json.dumps(request),
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                env=environment_without_secrets(),
            )
        except subprocess.TimeoutExpired as error:
            raise CheckFailed(f"llama.cpp did not answer within {TIMEOUT_S:.0f} s") from error
        if process.returncode < 0:
            reason = (process.stderr.strip().splitlines() or ["it gave no reason"])[-1][:200]
            raise CheckFailed(f"llama.cpp crashed on it (signal {-process.returncode}): {reason}")
        if process.returncode:
            raise CheckFailed(f"llama.cpp failed: {(process.stderr.strip().splitlines() or [''])[-1][:200]}")
        answer = json.loads(process.stdout.splitlines()[-1])
        if "error" in answer:
            raise CheckFailed(answer["error"])
        with np.load(request["logits"], allow_pickle=False) as arrays:
            return answer, [arrays[str(n)] for n in range(len(prompts))]


def _compare_tokens(expected: Expected, actual: list[list[int]]) -> str:
    for text, theirs, ours in zip(expected.texts, expected.ids, actual, strict=True):
        if theirs != ours:
            at = shared_length(theirs, ours)
            raise CheckFailed(
                f"in a conversation of {len(theirs)} tokens, number {at} is {ours[at : at + 1]} and not "
                f"{theirs[at : at + 1]}: {text[:60]!r}"
            )
    return f"{len(actual):,} conversations, {sum(map(len, actual)):,} tokens"


def _compare_answers(mine: Expected, expected: Expected, dtype: str, verdict: Verdict, name: str) -> str:
    kls, agreed, positions = [], 0, 0
    for ours, theirs in zip(mine.logits, expected.logits, strict=True):
        if ours.shape != theirs.shape:
            sizes = f"{ours.shape[-1]:,} tokens, and that of the model {theirs.shape[-1]:,}"
            raise CheckFailed(f"its vocabulary has {sizes}")
        if not np.isfinite(ours).all():
            raise CheckFailed("its logits contain NaN or infinity")
        target, predicted = (torch.from_numpy(x.astype(np.float32)).log_softmax(-1) for x in (theirs, ours))
        kls.append(sum_kl(target, predicted) / len(target))
        agreed += int((target.argmax(-1) == predicted.argmax(-1)).sum())
        positions += len(target)
    kl = max(0.0, float(np.mean(kls)))
    equal = sum(shared_length(a, b) for a, b in zip(mine.answers, expected.answers, strict=True))
    total = sum(map(len, expected.answers))
    verdict.numbers[name] = {"kl": kl, "agreement": agreed / positions, "equal_tokens": equal, "tokens": total}
    text = f"KL {kl:.2g} nats per token, {agreed / positions:.0%} of next tokens agree, "
    text += f"{equal} of {total} tokens of the answers are equal before they part"
    limit = MAX_KL.get(dtype, MAX_KL_OTHER)
    if kl > limit:
        raise CheckFailed(f"{text}; rounding explains at most {limit:g}: these are other weights, or another model")
    return text
