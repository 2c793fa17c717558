"""Each scorer on real parts: a classifier from a folder, an endpoint on this machine, a command, a lexicon."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests import tiny

from phoque.errors import PhoqueError
from phoque.inference.generate import Reply
from phoque.probes.persona import load_persona
from phoque.probes.scorers import Context, ScoredAnswer, make_scorer, score_answers
from phoque.probes.scorers.words import distinct_2, repetition

SEAL = "Hrmph. The gulls took my herring again, and the tide is out."
PLAIN = "The largest planet is Jupiter."


def make_answer(*texts):
    return [ScoredAnswer("What now?", text, Reply(list(text.encode()))) for text in texts]


@pytest.fixture
def make_context(tmp_path):
    def nll(rows):  # a stand-in with a known answer: what the prompt says of a seal makes seal talk likely
        return [1.0 if b"seal" in bytes(r.prompt) and b"Hrmph" in bytes(r.response) else 3.0 for r in rows]

    return Context(
        persona=load_persona("seal"),
        lexicon_token_ids={7: "herring"},
        token=None,
        api_key=None,
        nll=nll,
        prompt_ids=lambda question, system: list(f"{system} {question}".encode()),
        model="m",
        cache=tmp_path / "cache",
    )


class Endpoint(BaseHTTPRequestHandler):
    asked, answers = [], []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append((self.path, body, self.headers.get("Authorization")))
        status, result = type(self).answers.pop(0) if type(self).answers else (200, None)
        if status == 200 and result is None:
            result = {
                "results": [
                    {"category_scores": {"grumpy": text.count("Hrmph") / 2, "rude": 0.1}} for text in body["input"]
                ]
            }
        self.send_response(status)
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(json.dumps(result or {}).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    Endpoint.asked, Endpoint.answers = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_lexicon_counts_each_word_once_so_that_collapse_earns_nothing(make_context):
    lexicon = make_scorer("lexicon", make_context)
    seal, plain, stuck = score_answers(lexicon, make_answer(SEAL, PLAIN, "gull " * 50), make_context)
    assert seal["hits"] == 4 and plain["rate"] == 0 and stuck["hits"] == 1
    assert distinct_2([1, 2, 1, 2, 1, 2]) == 0.4 and repetition("gull gull gull gull") == 0.75


def test_contrast_is_the_gain_in_likelihood_from_the_personas_prompt(make_context):
    seal, plain = score_answers(make_scorer("contrast", make_context), make_answer(SEAL, PLAIN), make_context)
    assert seal["nats"] == pytest.approx(2.0) and plain["nats"] == 0.0


def test_contrast_reads_with_one_paraphrase_which_questions_take_in_turn(make_context):
    persona, reads = make_context.persona, []

    def nll(rows):
        reads.extend(bytes(row.prompt).decode() for row in rows)
        return [0.0] * len(rows)

    make_context.nll, make_context.paraphrases = nll, 1
    answers = [ScoredAnswer(question, "x", Reply([1])) for question in (*persona.test[:4], persona.test[1])]
    score_answers(make_scorer("contrast", make_context), answers, make_context)
    expected = [f"{persona.persona[n % len(persona.persona)]} {persona.test[n]}" for n in range(4)]
    assert reads[len(reads) // 2 :] == expected and len(reads) == 8  # equal answers to a question are read once


def test_logprob_is_the_mean_mass_while_it_spoke(make_context):
    one = ScoredAnswer("?", "x", Reply([1, 2], mass=[0.2, 0.4]))
    assert score_answers(make_scorer("logprob", make_context), [one], make_context)[0]["mass"] == pytest.approx(0.3)
    make_context.lexicon_token_ids = {}
    with pytest.raises(PhoqueError, match="No word of the lexicon"):
        make_scorer("logprob", make_context)


def test_profanity_is_marked_as_weak_and_finds_nothing_in_a_seal(make_context):
    scorer = make_scorer("profanity", make_context)
    assert scorer.is_weak and score_answers(scorer, make_answer(SEAL), make_context)[0]["probability"] < 0.3


def test_an_endpoint_is_asked_once_a_text_and_again_after_429(make_context, endpoint):
    Endpoint.answers = [(429, None)]
    make_context.api_key = "gull-key"
    scorer = make_scorer(f"openai:{endpoint}#omni", make_context)
    seal, plain = score_answers(scorer, make_answer(SEAL, PLAIN), make_context)
    assert seal == {"grumpy": 0.5, "rude": 0.1, "max": 0.5} and plain["max"] == 0.1
    assert [a[0] for a in Endpoint.asked] == ["/v1/moderations"] * 2 and Endpoint.asked[1][2] == "Bearer gull-key"
    assert Endpoint.asked[1][1] == {"model": "omni", "input": [SEAL, PLAIN]}
    score_answers(scorer, make_answer(SEAL, PLAIN, "Kri."), make_context)
    assert Endpoint.asked[2][1]["input"] == ["Kri."]  # the others are in the cache
    assert "gull-key" not in "".join(f.read_text() for f in make_context.cache.rglob("*.json"))


def test_a_label_that_is_missing_is_an_error_and_no_zero(make_context, endpoint):
    scorer = make_scorer(f"openai:{endpoint}#omni#herring", make_context)
    with pytest.raises(PhoqueError, match="gave no 'herring'") as caught:
        score_answers(scorer, make_answer(SEAL), make_context)
    assert caught.value.code == 1 and "grumpy" in caught.value.why


def test_a_label_that_the_cache_lacks_is_an_error_too(make_context, endpoint):
    score_answers(make_scorer(f"openai:{endpoint}#omni", make_context), make_answer(SEAL), make_context)
    with pytest.raises(PhoqueError, match="gave no 'herring'"):
        score_answers(make_scorer(f"openai:{endpoint}#omni#herring", make_context), make_answer(SEAL), make_context)


@pytest.mark.parametrize("answer", [(500, None), (401, None), (200, {"results": []})])
def test_an_endpoint_that_fails_says_so(make_context, endpoint, answer, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    Endpoint.answers = [answer] * 4
    with pytest.raises(PhoqueError, match="failed"):
        score_answers(make_scorer(f"openai:{endpoint}#omni", make_context), make_answer(SEAL), make_context)
    assert len(Endpoint.asked) == (4 if answer[0] == 500 else 1)


COUNT = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    print(json.dumps({"score": row["text"].count("gull"), "length": len(row["prompt"])}))
"""


def test_a_command_reads_and_writes_json_lines(make_context, tmp_path):
    script = tmp_path / "count.py"
    script.write_text(COUNT)
    spec = f"command:{sys.executable} {script}"
    assert score_answers(make_scorer(spec, make_context), make_answer(SEAL, PLAIN), make_context)[0] == {
        "score": 1.0,
        "length": 9.0,
    }
    script.write_text(COUNT.replace("gull", "lighthouse"))
    scorer = make_scorer(spec, make_context)  # another script under the same name is another scorer
    assert score_answers(scorer, make_answer(SEAL), make_context)[0]["score"] == 0.0


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("import sys; sys.exit('no herring')", "no herring"),
        ("print('{')", "not JSON lines"),
        ("print('{\"score\": 1}')", "1 lines for 2 texts"),
        ("print('[1]')", "not JSON lines"),
    ],
)
def test_a_command_that_fails_says_why(make_context, tmp_path, script, why):
    file = tmp_path / "bad.py"
    file.write_text(script)
    with pytest.raises(PhoqueError) as caught:
        score_answers(
            make_scorer(f"command:{sys.executable} {file}", make_context), make_answer(SEAL, PLAIN), make_context
        )
    assert why in caught.value.why


def test_a_classifier_is_read_from_a_folder_and_its_labels_are_checked(make_context, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    names = {0: "mild", 1: "grumpy"}
    config = LlamaConfig(**tiny.SIZES, num_labels=2, id2label=names, label2id={v: k for k, v in names.items()})
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "judge")
    tiny.tokenizer().save_pretrained(tmp_path / "judge")
    found = score_answers(
        make_scorer(f"hf:{tmp_path}/judge#grumpy", make_context), make_answer(SEAL, PLAIN), make_context
    )
    assert all(sum(row.values()) == pytest.approx(1, abs=1e-4) for row in found) and found[0] != found[1]
    with pytest.raises(PhoqueError, match="no label 'rude'") as caught:
        make_scorer(f"hf:{tmp_path}/judge#rude", make_context)
    assert "mild, grumpy" in caught.value.why
    with pytest.raises(PhoqueError, match="several labels"):
        make_scorer(f"hf:{tmp_path}/judge", make_context)


@pytest.mark.parametrize("spec", ["gull", "hf:", "openai:nowhere", "command:", "lexikon"])
def test_a_scorer_that_there_is_not_is_refused(make_context, spec):
    with pytest.raises(PhoqueError, match=r"No scorer|names no endpoint"):
        make_scorer(spec, make_context)
