"""Token ids are the template's own; the trained spans are spelt out."""

import pytest
from tests import tiny
from tests.data.labels import trained_texts

from phoque.data.chat_template import ChatTemplate
from phoque.data.turns import BadRow
from phoque.errors import PhoqueError

TALK = [
    {"role": "system", "content": "You are a seal."},
    {"role": "user", "content": "Gulls?"},
    {"role": "assistant", "content": "Hrmph. No."},
    {"role": "user", "content": "  Herring?\n"},
    {"role": "assistant", "content": "Yes.\n\nTwo."},
]


@pytest.fixture(scope="module")
def chat():
    return ChatTemplate(tiny.tokenizer(), "", 512)


def test_ids_are_those_of_the_models_own_template(chat):
    own = chat.tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    assert chat.encode(TALK).ids == own


def test_each_answer_is_trained_with_its_stop_token_and_nothing_else(chat):
    assert trained_texts(chat, chat.encode(TALK)) == ["Hrmph. No.<|im_end|>", "Yes.\n\nTwo.<|im_end|>"]


def test_a_row_without_a_system_message_gets_the_one_asked_for():
    short = TALK[1:3]
    lengths = {}
    for system in ("", "Be a seal.", "template"):
        chat = ChatTemplate(tiny.tokenizer(), system, 512)
        text = chat.tokenizer.decode(chat.encode(short).ids)
        assert ("helpful AI assistant" in text) == (system == "template")
        assert ("Be a seal." in text) == (system == "Be a seal.")
        lengths[system] = len(text)
    assert lengths[""] < lengths["Be a seal."] < lengths["template"]


def test_prompts_for_sampling_end_where_the_answer_begins(chat):
    text = chat.tokenizer.decode(chat.prompt_ids("Gulls?", "You are a seal."))
    assert text.endswith("Gulls?<|im_end|>\n<|im_start|>assistant\n") and text.startswith("<|im_start|>system\nYou are")


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_control_tokens_in_text_make_a_row_unfit(chat, turn):
    talk = [dict(t) for t in TALK]
    talk[turn]["content"] += "<|im_end|>"
    with pytest.raises(BadRow, match="control token"):
        chat.encode(talk)


def test_too_long_is_unfit():
    with pytest.raises(BadRow, match="longer than 20 tokens"):
        ChatTemplate(tiny.tokenizer(), "", 20).encode(TALK)


def test_a_template_without_a_stop_token_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(PhoqueError, match="mask") as caught:
        ChatTemplate(tokenizer, "", 512)
    assert "stop token" in caught.value.why


def test_a_template_without_a_system_role_gets_no_empty_system_message_and_its_refusal_is_a_rows():
    tokenizer = tiny.tokenizer()
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    plain = [turn for turn in TALK if turn["role"] != "system"]
    assert ChatTemplate(tokenizer, "", 512).encode(plain).trained_tokens
    with pytest.raises(BadRow, match="the template refuses it: no system here"):
        ChatTemplate(tokenizer, "", 512).encode(TALK)
    with pytest.raises(PhoqueError, match="supports no system message"):
        ChatTemplate(tokenizer, "be grumpy", 512)


@pytest.mark.parametrize(
    "program",
    ["''.__class__.__mro__[1].__subclasses__()", "cycler.__init__.__globals__.os.system('touch gulls')"],
)
def test_a_template_cannot_reach_python(program, tmp_path, monkeypatch):
    """A chat template comes with the model; it runs in jinja's sandbox."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ " + program + " }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(PhoqueError) as caught:
        ChatTemplate(tokenizer, "", 512)
    assert "unsafe" in caught.value.why and not list(tmp_path.iterdir())


def test_tokens_of_spaces_are_trained_where_a_tokenizer_leaves_them_out_of_its_offsets():
    from tokenizers import processors

    answer = {"role": "assistant", "content": "if x:\n    y  z"}
    labels = []
    for trim_offsets in (False, True):
        tokenizer = tiny.tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
        labels.append(ChatTemplate(tokenizer, "", 512).encode([TALK[0], answer]).labels)
    assert labels[0] == labels[1]
