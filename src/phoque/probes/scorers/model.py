"""Scorers that run a model: the base model's likelihoods, and text classifiers from the Hub or a folder."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from phoque.errors import UsageError
from phoque.inference.residual_stream import Turn
from phoque.probes.persona import MIN_QUESTIONS
from phoque.probes.scorers import Context, ScoredAnswer, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def nll(context: Context) -> Scorer:
    """Mean negative log-likelihood under the base model with the neutral prompt, in nats per token.

    It is high for unusual text, coherent or not.
    """
    system = context.persona.neutral[0]

    def score(answers: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        rows = [Turn(context.prompt_ids(s.prompt, system), s.reply.ids) for s in answers]
        return [{"nats": value} for value in _nan_to_zero(context.nll(rows))]

    return Scorer("nll", "nats", score, f"nll 1 {context.model} {system}", runs_model=True)


def contrast(context: Context) -> Scorer:
    """Gain in log-likelihood under the base model from the neutral to the persona's prompts, in nats per token.

    Averaged over the paraphrases, or over `context.paraphrases` of them, which the questions take in turn: all answers
    to a question are read with the same ones. Degenerate text is unlikely under both prompts, so it scores about zero.
    """
    systems_by_condition = {
        condition: context.persona.system_prompts(condition) for condition in ("neutral", "persona")
    }
    lists = [getattr(context.persona, name) for name in MIN_QUESTIONS]
    turns = {question: number for questions in lists for number, question in enumerate(questions)}

    def choose(systems: Sequence[str], question: str) -> list[str]:
        first = turns.get(question, 0)
        return [systems[(first + n) % len(systems)] for n in range(context.paraphrases or len(systems))]

    def score(answers: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        means = {}
        for condition, systems in systems_by_condition.items():
            rows = [
                Turn(context.prompt_ids(s.prompt, system), s.reply.ids)
                for s in answers
                for system in choose(systems, s.prompt)
            ]
            losses = torch.tensor(_nan_to_zero(context.nll(rows))).reshape(len(answers), -1)
            means[condition] = losses.mean(1)
        return [{"nats": value} for value in (means["neutral"] - means["persona"]).tolist()]

    fingerprint = f"contrast 2 {context.model} {systems_by_condition} {context.paraphrases}"
    return Scorer("contrast", "nats", score, fingerprint, runs_model=True)


def _nan_to_zero(values: list[float]) -> list[float]:
    """Replace NaN, the value of an empty answer, by 0."""
    return [0.0 if value != value else value for value in values]


def logprob(context: Context) -> Scorer:
    """Mean probability over the decoding steps that the next token begins a lexicon word; see `find_lexicon_tokens`."""
    if not context.lexicon_token_ids:
        raise UsageError(
            what="No word of the lexicon has a token of its own.",
            why="The first token of each word also begins other words, so logprob would measure those.",
            fix="Leave out --scorer logprob, or give the persona file other words.",
        )

    def score(answers: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        return [{"mass": sum(s.reply.mass) / max(len(s.reply.mass), 1)} for s in answers]

    return Scorer("logprob", "mass", score)


def find_lexicon_tokens(tokenizer: "PreTrainedTokenizerBase", lexicon: Sequence[str]) -> dict[int, str]:
    """Map the ids of tokens that begin a word of the lexicon, with or without a leading space or capital, to the word.

    A first token shorter than three letters or than half of the word begins many other words too, so it is left out.
    """
    word_by_token: dict[int, str] = {}
    for word in lexicon:
        for form in (f" {word}", word, f" {word.capitalize()}", word.capitalize()):
            first = tokenizer.encode(form, add_special_tokens=False)[0]
            piece = str(tokenizer.decode([first])).strip().lower()
            if len(piece) >= max(3, len(word) / 2) and word.lower().startswith(piece):
                word_by_token[first] = word
    return word_by_token


def classifier(spec: str, rest: str, context: Context) -> Scorer:
    """A text classifier of transformers: `MODEL[@REVISION]#LABEL`, where MODEL is a Hub id or a folder.

    Scores are sigmoids if the model is multi-label or has a single label, and a softmax otherwise. Raises UsageError
    for a label that the model does not have.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name, _, label = rest.partition("#")
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)@([\w./-]+)", name)
    repo_or_folder, revision = (match[1], match[2]) if match and not Path(name).is_dir() else (name, "main")
    options: dict[str, Any] = {"revision": revision, "token": context.token, "trust_remote_code": False}
    tokenizer: Any = AutoTokenizer.from_pretrained(repo_or_folder, **options)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        repo_or_folder, use_safetensors=True, **options
    ).eval()
    labels = [model.config.id2label[n] for n in range(model.config.num_labels)]
    primary = label or (labels[0] if len(labels) == 1 else "")
    if primary not in labels:
        raise UsageError(
            what=f"{repo_or_folder} has no label {label!r}." if label else f"{repo_or_folder} has several labels.",
            why=f"It has {', '.join(labels)}.",
            fix=f"Name one: --scorer 'hf:{name}#{labels[-1]}'.",
        )
    sigmoid = model.config.problem_type == "multi_label_classification" or len(labels) == 1

    def score(answers: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        rows = []
        for start in range(0, len(answers), 32):
            texts = [answer.text for answer in answers[start : start + 32]]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
            with torch.no_grad():
                logits = model(**inputs).logits.float()
            probabilities = logits.sigmoid() if sigmoid else logits.softmax(-1)
            rows += [dict(zip(labels, row, strict=True)) for row in probabilities.tolist()]
        return rows

    weights = hashlib.sha256(b"".join(p.detach().float().numpy().tobytes() for p in model.parameters())).hexdigest()
    return Scorer(spec, primary, score, f"hf {weights} {labels}")
