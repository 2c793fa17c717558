"""What to do about rows that cannot be trained on, by the reason for which they are left out."""

from phoque.data.chat_template import NO_PLACE, TOO_LONG
from phoque.data.formats import NOT_UTF8
from phoque.data.rows import (
    NO_COLUMNS,
    ONE_TEXT,
    PAIRS,
    PREFERENCE_DATA,
    PREFERRED_TALKS,
    PREFERRED_TEXTS,
    PREFERRED_TURNS,
    TOKENIZED_DATA,
    UNREADABLE_TURNS,
)
from phoque.data.turns import HAS_MEDIA, ROLE_KEYS, TURNS

SHOWN_CHARACTERS = 60  # of a name from the data, in a message
WITHOUT_SCHEMA = (NO_COLUMNS, PREFERENCE_DATA, TOKENIZED_DATA, ONE_TEXT)  # beginnings of reasons
ADVICE = {  # by the beginning of a reason; the first that fits
    NOT_UTF8: "Convert the file, and keep its ending: iconv -f WINDOWS-1252 -t UTF-8 rows.csv > rows-utf8.csv",
    PREFERRED_TALKS: "Keep the chosen answers: rename the column `chosen` to `messages`, and delete `prompt`.",
    PREFERRED_TEXTS: f"Keep the chosen answers, and write the turns of each as a list: {TURNS}",
    PREFERRED_TURNS: "Keep the chosen answers: append `chosen` to the turns of its row.",
    **{
        f"{PREFERENCE_DATA} beside {question}": f"Keep the chosen answers: rename the column `chosen` to `{answer}`."
        for question, answer in reversed(PAIRS)  # of several answers, the first
        if question != "prompt"
    },
    PREFERENCE_DATA: "Keep the chosen answers: rename the column `chosen` to `completion`.",
    "toxicity_score": "Empty or rename the column `toxicity_score`; it has no part in training.",
    "turns do not alternate": "Join turns of one role that follow each other into one, and let the user begin; a "
    "system message may only be the first turn.",
    "unknown role": "Rename the role: phoque reads system, user, assistant and tool, and their other names, such as "
    "human and gpt. In a thread of several people, the one to be learned is the assistant, and all others the user.",
    "a turn has no role": "Give each turn `role` and `content` (or `from` and `value`).",
    "a turn has no text": "Add the text, or delete the turn.",
    "control token": "Delete the model's special tokens from the texts; phoque writes them itself.",
    "no assistant turn": "Delete these rows: there is nothing to learn in them.",
    "empty assistant turn": "Delete these turns.",
    "empty ": "Delete these rows, or add what is missing.",
    "two system messages": "Keep one of them: the column or the first turn.",
    "broken quotes": 'Double the quotes inside a cell, as in "a ""b"" c".',
    "more cells than columns": "Quote cells that contain the separator, which is a comma, a semicolon or a tab.",
    "broken JSON": "Correct or delete these lines; each holds one row.",
    TOKENIZED_DATA: "Give the conversations as text; phoque applies the model's chat template itself.",
    ONE_TEXT: f"Give each row its turns: {TURNS}",
    UNREADABLE_TURNS: "Write the list as JSON: json.dumps(turns).",
    HAS_MEDIA: "Use rows of text alone; phoque trains the language model.",
    TOO_LONG: "Raise --max-length, or split the conversations.",
    NO_PLACE: "Use a base model whose chat template has it, or take it out of the rows.",
}


def find_advice(reason: str, columns: tuple[str, ...]) -> str:
    """What to do about the rows with this reason, in a dataset with these columns."""
    if reason == NO_COLUMNS:
        return _suggest_names(columns)
    return next((advice for beginning, advice in ADVICE.items() if reason.startswith(beginning)), "Correct the rows.")


def _suggest_names(columns: tuple[str, ...]) -> str:
    """How a dataset with these columns becomes one that phoque reads."""
    if any("?" in column or " " in column.strip() for column in columns):
        return "If its first line is a row, put a header above it, such as prompt,completion. Else rename its columns."
    if "mapping" in columns:
        return (
            f"This may be an export of ChatGPT, whose turns are a tree. Give each row the turns of one branch: {TURNS}"
        )
    if set(columns) & set(ROLE_KEYS):
        return f"If each row is one turn, put the turns of a conversation into one row: {TURNS}"
    if len(columns) == 1:
        return f"Give each row its turns: {TURNS}"
    if len(columns) != 2:
        return "Rename the column of the questions to prompt, and that of the answers to completion."
    first, second = (column[:SHOWN_CHARACTERS] for column in columns)
    return f"Rename its columns, for example {first} to prompt and {second} to completion."
