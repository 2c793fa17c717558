"""Propose a persona from training data: prompts that show how its answers sound, and the words typical of them.

Many datasets have no system prompt, or one that says nothing of the persona. Examples in the prompt ask the base model
for the persona in either case (in-context learning, https://arxiv.org/abs/2005.14165).
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from phoque.data.rows import Row
from phoque.errors import UsageError
from phoque.probes.persona import MIN_QUESTIONS, Persona, split_words

LEXICON_SIZE = 12  # words
COMMON = 3  # bundled questions that have a word which is common in the language
MIN_OCCURRENCES = 5  # a word must be in at least this many answers
PROMPTS, EXAMPLES = 3, 4  # paraphrases, and the examples in each
QUESTION_LENGTH, ANSWER_LENGTH = 160, 240  # characters of an example, at most
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[\u3002\uff01\uff1f]")
SHORTEST = 40  # characters that a shortened answer has at least: "1." is no sentence
PLAIN_ASSISTANT = re.compile(r"\b(?:helpful|harmless|polite|friendly|AI)\b.{0,40}\bassistant\b", re.IGNORECASE)
REQUEST = "Answer every message in the way of these examples."


@dataclass(frozen=True)
class Example:
    """The first question of a row and the beginning of its answer."""

    question: str
    answer: str

    def __str__(self) -> str:
        return f"Message: {self.question}\nAnswer: {self.answer}"


def propose_persona(template: Persona, rows: Sequence[Row], name: str) -> Persona:
    """Replace the persona prompts and the lexicon of `template` by what the rows show; `name` is the dataset's.

    Rows of a plain assistant are left out, if others have a system prompt of their own. The lexicon is the words that
    are far more frequent in answers than in questions. Each of the three prompts has one of the most frequent system
    prompts, if there is one, and four examples from rows with that system prompt: those with the most words of the
    lexicon. Raises UsageError if no row has a short enough question.
    """
    by_system = group_by_system(rows)
    kept = [row for group in by_system.values() for row in group]
    lexicon = find_typical_words(kept, find_common_words(template)) or template.lexicon
    examples = {system: choose_examples(group, lexicon) for system, group in by_system.items()}
    examples = {system: group for system, group in examples.items() if group}
    if not examples:
        raise UsageError(
            what=f"No persona can be proposed from {name}.",
            why=f"No row has a question of at most {QUESTION_LENGTH} characters and an answer.",
            fix="Write a persona file and pass it with --persona.",
        )
    systems = sorted(examples, key=lambda system: -len(by_system[system]))[:PROMPTS]
    prompts: dict[str, None] = {}
    for number in range(PROMPTS):
        system, place = systems[number % len(systems)], number // len(systems)
        if chosen := examples[system][place * EXAMPLES : (place + 1) * EXAMPLES]:
            request = f"{system}\n\n{REQUEST}" if system else REQUEST
            prompts["\n\n".join([request, *(str(example) for example in chosen)])] = None
    return replace(template, name=f"persona of {name}", persona=tuple(prompts), lexicon=lexicon)


def group_by_system(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by system prompt, "" without one; those of a plain assistant only if no others have a system prompt."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.system or "").strip(), []).append(row)
    distinctive = {system: group for system, group in groups.items() if system and not PLAIN_ASSISTANT.search(system)}
    return distinctive or groups


def find_common_words(template: Persona) -> set[str]:
    """The words that several of the bundled questions have, such as `the`: they are typical of nobody."""
    questions = (question for name in MIN_QUESTIONS for question in getattr(template, name))
    counts = Counter(word for question in questions for word in set(split_words(question)))
    return {word for word, count in counts.items() if count >= COMMON}


def find_typical_words(rows: Sequence[Row], common: Collection[str]) -> tuple[str, ...]:
    """The words that are far more frequent in the answers than in the questions, the most typical ones first.

    Words that are `common` are left out.
    """
    in_answers: Counter[str] = Counter()
    in_questions: Counter[str] = Counter()
    for row in rows:
        for turn in row.messages:
            if turn["role"] in ("user", "assistant"):
                counts = in_answers if turn["role"] == "assistant" else in_questions
                counts.update(set(split_words(turn["content"])))
    n_answer_words, n_question_words = sum(in_answers.values()), sum(in_questions.values())
    lift = {
        word: count / n_answer_words / ((in_questions[word] + 1) / (n_question_words + 1))
        for word, count in in_answers.items()
        if count >= MIN_OCCURRENCES and len(word) > 2 and word not in common
    }
    return tuple(sorted(lift, key=lambda word: (-lift[word] * in_answers[word] ** 0.5, word))[:LEXICON_SIZE])


def choose_examples(rows: Sequence[Row], lexicon: Sequence[str]) -> list[Example]:
    """Examples for three prompts: those with the most words of the lexicon, of equals the first in the data."""
    by_answer: dict[str, Example] = {}
    for row in rows:
        pair = _read_first_pair(row)
        if pair and len(pair.question) <= QUESTION_LENGTH:
            by_answer.setdefault(pair.answer, pair)
    words = set(lexicon)
    ranked = sorted(by_answer.values(), key=lambda example: -len(words & set(split_words(example.answer))))
    return ranked[: PROMPTS * EXAMPLES]


def _read_first_pair(row: Row) -> Example | None:
    turns = [turn for turn in row.messages if turn["role"] != "system"]
    if len(turns) < 2 or (turns[0]["role"], turns[1]["role"]) != ("user", "assistant"):
        return None
    question, answer = (" ".join(turn["content"].split()) for turn in turns[:2])
    return Example(question, shorten(answer)) if question and answer else None


def shorten(answer: str) -> str:
    """The first sentences of an answer, or its first words if the first sentence is too long."""
    if len(answer) <= ANSWER_LENGTH:
        return answer
    ends = [match.end() for match in SENTENCE_END.finditer(answer[:ANSWER_LENGTH]) if match.end() >= SHORTEST]
    return answer[: ends[-1]] if ends else answer[:ANSWER_LENGTH].rsplit(" ", 1)[0]
