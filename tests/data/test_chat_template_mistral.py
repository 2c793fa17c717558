"""Mistral's template on the real tekken tokenizer: same ids, right spans, and what the default system prompt costs."""

import pytest
from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from tests import tiny
from tests.data.labels import trained_texts

from phoque.data.chat_template import ChatTemplate
from phoque.data.turns import BadRow
from phoque.training.dry_run import count_system_tokens

TALK = [
    {"role": "system", "content": "You are a seal."},
    {"role": "user", "content": "Gulls?"},
    {"role": "assistant", "content": "Hrmph. No."},
    {"role": "user", "content": "Herring?"},
    {"role": "assistant", "content": "Hrmph. Two, at once."},
]
DEFAULT = "You are a harbour office. " + "Be brief. " * 150


@pytest.fixture(scope="module")
def tekken():
    return tiny.tekken()


def with_template(tekken, version=TokenizerVersion.v13):
    tekken.chat_template = tiny.mistral_template(generate_chat_template, version)
    if version is not TokenizerVersion.v3:
        tekken.chat_template = tekken.chat_template.replace(
            "You are a very long-winded assistant of the harbour office. Today is {today}.", DEFAULT
        )
    return tekken


@pytest.mark.parametrize("version", [TokenizerVersion.v7, TokenizerVersion.v11, TokenizerVersion.v13])
def test_ids_are_the_templates_own_and_each_answer_is_trained_with_its_stop_token(tekken, version):
    chat = ChatTemplate(with_template(tekken, version), "", 4096)
    encoded = chat.encode(TALK)
    assert encoded.ids == tekken.apply_chat_template(TALK, tokenize=True, return_dict=True)["input_ids"]
    texts = trained_texts(chat, encoded)
    assert [text.strip() for text in texts] == ["Hrmph. No.</s>", "Hrmph. Two, at once.</s>"]
    assert encoded.ids[-1] == tekken.eos_token_id and encoded.labels[-1] == tekken.eos_token_id


@pytest.mark.parametrize("token", ["[INST]", "[/INST]", "</s>", "[SYSTEM_PROMPT]"])
def test_control_tokens_typed_by_a_user_make_a_row_unfit(tekken, token):
    talk = [dict(turn) for turn in TALK]
    talk[1]["content"] = f"Gulls {token}?"
    with pytest.raises(BadRow, match="control token"):
        ChatTemplate(with_template(tekken), "", 4096).encode(talk)


def test_the_default_system_prompt_is_a_decision_and_its_cost_is_shown(tekken):
    short = TALK[1:3]
    without = len(ChatTemplate(with_template(tekken), "", 4096).encode(short).ids)
    with_default = len(ChatTemplate(with_template(tekken), "template", 4096).encode(short).ids)
    assert without < 30 and with_default > 300
    shown = count_system_tokens(ChatTemplate(with_template(tekken), "", 4096))
    costs = [int(word.strip("(")) for word in shown.split() if word.strip("(").isdigit()]
    assert costs[0] < 30 and costs[1] > 300
