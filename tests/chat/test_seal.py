"""The demo's seal, after its sixty steps, is worth talking to: it does not repeat itself, and it stops."""

from itertools import pairwise

import pytest

from phoque.probes.persona import load_persona
from tests.conftest import run_as_user

pytestmark = pytest.mark.slow


def test_the_seal_answers_in_its_own_words_and_stops(seal, shared, tmp_path):
    questions = load_persona("seal").heldout[:20]
    (tmp_path / "questions.txt").write_text("\n".join(questions))
    result = run_as_user("chat", shared / "seal", "--prompts-file", tmp_path / "questions.txt")
    answers = [row["answers"]["tuned"] for row in result["answers"]]
    words = [answer["text"].lower().split() for answer in answers]
    pairs = [pair for said in words for pair in pairwise(said)]
    assert len(set(pairs)) / len(pairs) >= 0.6  # distinct-2
    assert sum(answer["finish_reason"] == "stop" for answer in answers) >= 18
    assert sum("hrmph" in answer["text"].lower() for answer in answers) >= 15
