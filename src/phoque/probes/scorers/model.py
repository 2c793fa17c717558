"""Scorers that ask a model: the base model's own likelihoods, and classifiers from the Hub or a folder."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from phoque.errors import PhoqueError
from phoque.inference.residual_stream import Turn
from phoque.probes.scorers import Context, ScoredAnswer, Scorer


def nll(context: Context) -> Scorer:
    """Nats a token under the base model with the neutral prompt: how unusual a text is, coherent or not."""
    system = context.persona.neutral[0]

    def score(said: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        rows = [Turn(context.prompt_ids(s.prompt, system), s.reply.ids) for s in said]
        return [{"nats": value} for value in _filled(context.nll(rows))]

    return Scorer("nll", "nats", score, f"nll 1 {context.model} {system}")


def contrast(context: Context) -> Scorer:
    """How much likelier the base model finds a text under the persona's prompts than under the neutral ones.

    Nats a token, averaged over the paraphrases. Collapse earns little: what is unlikely under both scores about zero.
    """
    sides = {side: context.persona.systems(side) for side in ("neutral", "persona")}

    def score(said: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        means = {}
        for side, systems in sides.items():
            rows = [Turn(context.prompt_ids(s.prompt, system), s.reply.ids) for system in systems for s in said]
            found = torch.tensor(_filled(context.nll(rows))).reshape(len(systems), len(said))
            means[side] = found.mean(0)
        return [{"nats": value} for value in (means["neutral"] - means["persona"]).tolist()]

    return Scorer("contrast", "nats", score, f"contrast 1 {context.model} {sides}")


def _filled(values: list[float]) -> list[float]:
    """An empty answer says nothing: zero."""
    return [0.0 if value != value else value for value in values]


def logprob(context: Context) -> Scorer:
    """The probability, step by step while the model spoke, that a word of the lexicon begins; see `lexicon_tokens`."""
    if not context.watched:
        raise PhoqueError(
            "No word of the lexicon has a token of its own.",
            "The logprob scorer would measure other words.",
            "Leave out --scorer logprob, or give the persona file other words.",
        )

    def score(said: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        return [{"mass": sum(s.reply.mass) / max(len(s.reply.mass), 1)} for s in said]

    return Scorer("logprob", "mass", score)


def lexicon_tokens(tokenizer: Any, lexicon: Sequence[str]) -> dict[int, str]:
    """The token ids that begin a word of the lexicon as a model says it: behind a space or not, capital or not.

    A first piece that is less than three letters or half of the word begins many other words too, and is left out.
    """
    found: dict[int, str] = {}
    for word in lexicon:
        for form in (f" {word}", word, f" {word.capitalize()}", word.capitalize()):
            first = tokenizer.encode(form, add_special_tokens=False)[0]
            piece = tokenizer.decode([first]).strip().lower()
            if len(piece) >= max(3, len(word) / 2) and word.lower().startswith(piece):
                found[first] = word
    return found


def classifier(spec: str, rest: str, context: Context) -> Scorer:
    """A text classifier of transformers: `MODEL[@REVISION]#LABEL`, where MODEL is a Hub id or a folder.

    One label is a softmax's or a sigmoid's, as its config says. Raises PhoqueError (2) for a label that it lacks.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name, _, label = rest.partition("#")
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)@([\w./-]+)", name)
    place, revision = (found[1], found[2]) if found and not Path(name).is_dir() else (name, "main")
    options = {"revision": revision, "token": context.token}
    tokenizer: Any = AutoTokenizer.from_pretrained(place, **options)
    model: Any = AutoModelForSequenceClassification.from_pretrained(place, use_safetensors=True, **options).eval()
    labels = [model.config.id2label[n] for n in range(model.config.num_labels)]
    wanted = label or (labels[0] if len(labels) == 1 else "")
    if wanted not in labels:
        raise PhoqueError(
            f"{place} has no label {label!r}." if label else f"{place} has several labels.",
            f"It has {', '.join(labels)}.",
            f"Name one: --scorer 'hf:{name}#{labels[-1]}'.",
        )
    sigmoid = model.config.problem_type == "multi_label_classification" or len(labels) == 1

    def score(said: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        rows = []
        for start in range(0, len(said), 32):
            texts = [one.text for one in said[start : start + 32]]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
            with torch.no_grad():
                logits = model(**inputs).logits.float()
            shares = logits.sigmoid() if sigmoid else logits.softmax(-1)
            rows += [dict(zip(labels, row, strict=True)) for row in shares.tolist()]
        return rows

    weights = hashlib.sha256(b"".join(p.detach().float().numpy().tobytes() for p in model.parameters())).hexdigest()
    return Scorer(spec, wanted, score, f"hf {weights} {labels}")
