"""Any chat template: ids are its own, and loss is on what the model generates, whatever is written around it."""

import re
import time
from pathlib import Path

import pytest
import trl
from tests import tiny
from tests.data.labels import trained_texts

from phoque.data.chat_template import ChatTemplate
from phoque.data.turns import BadRow
from phoque.errors import PhoqueError

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TALK = [
    {"role": "user", "content": "Gulls?"},
    {"role": "assistant", "content": "Hrmph. No."},
    {"role": "user", "content": "  Herring?\n"},
    {"role": "assistant", "content": "Yes.\n\nTwo."},
]
SYSTEM = {"role": "system", "content": "Be a seal."}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "tide", "arguments": {"place": "pier"}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "tide", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
]
TOOL_TALK = [
    TALK[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "low", "name": "tide", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "Low."},
    *TALK[2:],
]
SPECIAL = re.compile(r"<[|｜][^<>{}'\"\s]{1,30}[|｜]>|<(?:start|end)_of_turn>|</?s>|<turn\|>|<\|turn>")
# templates of models that see images take a text as a list of parts, and one has no stop token of its own
REFUSED = {"glm4moe", "idefics3", "smolvlm", "llava_next"}
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))


def tokenizer_for(template: str):
    tokenizer = tiny.tokenizer()
    tokens = sorted(set(SPECIAL.findall(template)) - {"<|endoftext|>", "<|im_start|>", "<|im_end|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = template
    return tokenizer


def chat_for(name: str, system: str = "") -> ChatTemplate:
    return ChatTemplate(tokenizer_for((TEMPLATES / f"{name}.jinja").read_text()), system, 8192)


def template_ids(chat: ChatTemplate, messages, tools=None) -> list[int]:
    complete = chat.with_system(messages)
    return chat.tokenizer.apply_chat_template(complete, tools=tools, tokenize=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("name", sorted(set(NAMES) - REFUSED))
def test_ids_are_the_templates_own_and_each_answer_is_trained_to_its_stop_token(name):
    chat = chat_for(name)
    talks = [TALK, [SYSTEM, *TALK]] if chat.default_system is not None else [TALK]
    for talk in talks:
        encoded = chat.encode(talk)
        assert encoded.ids == template_ids(chat, talk)
        first, second = trained_texts(chat, encoded)
        assert re.search(r"(^|[>\n])Hrmph\. No\.\s*<[^<>]+>\n?$", first), first
        assert re.search(r"(^|[>\n])Yes\.\n\nTwo\.\s*<[^<>]+>\n?$", second), second
        assert "Gulls" not in first and "Herring" not in second


def test_many_templates_are_tried():
    assert len(NAMES) >= 40 and set(NAMES) > REFUSED


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_template_that_is_not_for_text_is_refused_with_its_reason(name):
    with pytest.raises(PhoqueError, match="chat template") as caught:
        chat_for(name)
    assert caught.value.code == 2


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "llama3_2", "gptoss", "lfm2_v2"])
def test_tool_calls_are_trained_and_results_are_not(name):
    chat = chat_for(name)
    encoded = chat.encode(TOOL_TALK, tools=TOOLS)
    assert encoded.ids == template_ids(chat, TOOL_TALK, TOOLS)
    called, after, last = trained_texts(chat, encoded)
    assert "tide" in called and "pier" in called and "low" not in called and called.rstrip().endswith(">")
    assert "Low." in after and "Two." in last


def test_reasoning_that_a_template_removes_from_earlier_turns_is_not_trained_and_is_noted():
    talk = [dict(turn) for turn in TALK]
    talk[1]["content"] = "<think>\nThieves.\n</think>\n\nHrmph. No."
    talk[3]["reasoning_content"] = "Fish."
    chat = chat_for("qwen3")
    encoded = chat.encode(talk)
    assert encoded.ids == template_ids(chat, talk)
    assert trained_texts(chat, encoded) == [
        "Hrmph. No.<|im_end|>",
        "<think>\nFish.\n</think>\n\nYes.\n\nTwo.<|im_end|>",
    ]
    assert encoded.notes == ("the template leaves out reasoning",)
    with pytest.raises(BadRow, match="no place for reasoning"):
        chat_for("llama3").encode(talk)


def test_what_the_template_has_no_place_for_is_a_reason():
    for name, reason in (("llama3", "no place for tools"), ("gemma", "no place for tools")):
        with pytest.raises(BadRow, match=reason):
            chat_for(name).encode(TOOL_TALK, tools=TOOLS)


TINYLLAMA = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token "
    "}}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif "
    "%}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MISTRAL_V3 = (  # the system message goes into the last question, and is lost when an answer follows it
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}{%- if loop.last and system_message is "
    "defined %}{{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- elif message['role'] == 'assistant' %}"
    "{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"
)
QUOTED_CHATML = (
    '{%- for message in messages %}{{- "<|im_start|>" ~ message.role ~ "\\n" ~ (message.content | trim) ~ '
    '"<|im_end|>\\n" }}{%- endfor %}{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}'
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TINYLLAMA, ["Hrmph. No.<|im_end|>", "Yes.\n\nTwo.<|im_end|>"]),
        (QUOTED_CHATML, ["Hrmph. No.<|im_end|>", "Yes.\n\nTwo.<|im_end|>"]),
        (MISTRAL_V3, [" Hrmph. No.<|im_end|>", " Yes.\n\nTwo.<|im_end|>"]),
        (LLAMA2, [" Hrmph. No. <|im_end|>", " Yes.\n\nTwo. <|im_end|>"]),
    ],
)
def test_templates_in_other_spellings_are_masked(template, expected):
    chat = ChatTemplate(tokenizer_for(template), "", 512)
    encoded = chat.encode(TALK)
    assert encoded.ids == template_ids(chat, TALK) and trained_texts(chat, encoded) == expected


def test_a_system_message_that_a_template_loses_is_a_reason():
    chat = ChatTemplate(tokenizer_for(MISTRAL_V3), "", 512)
    assert chat.default_system is None
    with pytest.raises(BadRow, match="leaves out the text of the system's turn"):
        chat.encode([SYSTEM, *TALK])


def test_a_template_that_rewrites_texts_is_a_reason_with_the_first_difference():
    template = QUOTED_CHATML.replace("message.content | trim", "message.content | replace('e', '3')")
    chat = ChatTemplate(tokenizer_for(template), "", 512)
    with pytest.raises(BadRow, match=r"the template changes the text: 'es.* becomes '3s"):
        chat.encode(TALK)


def test_named_templates_are_chosen_by_what_a_row_has():
    tokenizer = tokenizer_for((TEMPLATES / "qwen3.jinja").read_text())
    tokenizer.chat_template = {"default": QUOTED_CHATML, "tool_use": tokenizer.chat_template}
    chat = ChatTemplate(tokenizer, "", 2048)
    assert trained_texts(chat, chat.encode(TALK))[0] == "Hrmph. No.<|im_end|>"
    assert "pier" in trained_texts(chat, chat.encode(TOOL_TALK, tools=TOOLS))[0]
    tokenizer.chat_template = {"rag": QUOTED_CHATML, "tool_use": QUOTED_CHATML}
    with pytest.raises(PhoqueError, match="none of them is the default") as caught:
        ChatTemplate(tokenizer, "", 512)
    assert "rag, tool_use" in caught.value.why


MARKED = QUOTED_CHATML.replace(
    '(message.content | trim) ~ "<|im_end|>\\n" }}',
    '"" }}{% if message.role == "assistant" %}{% generation %}{{ message.content ~ "<|im_end|>" }}{% endgeneration %}'
    '{% else %}{{ message.content ~ "<|im_end|>" }}{% endif %}{{ "\\n" }}',
)


def test_generation_marks_of_a_template_are_honored_and_checked():
    chat = ChatTemplate(tokenizer_for(MARKED), "", 512)
    encoded = chat.encode(TALK)
    assert encoded.ids == template_ids(chat, TALK)
    assert trained_texts(chat, encoded) == ["Hrmph. No.<|im_end|>", "Yes.\n\nTwo.<|im_end|>"]
    without_stop = MARKED.replace('message.content ~ "<|im_end|>" }}{% end', "message.content }}{% end").replace(
        "{% endgeneration %}", '{% endgeneration %}{{ "<|im_end|>" }}'
    )
    with pytest.raises(PhoqueError, match="exclude the stop token"):
        ChatTemplate(tokenizer_for(without_stop), "", 512)


def test_a_turn_without_loss_is_context_and_so_is_a_greeting():
    chat = chat_for("qwen2_5")
    assert trained_texts(chat, chat.encode(TALK, untrained=frozenset({1}))) == ["Yes.\n\nTwo.<|im_end|>"]
    greeted = [SYSTEM, {"role": "assistant", "content": "Waves."}, *TALK]
    assert len(trained_texts(chat, chat.encode(greeted))) == 2
    trained = ChatTemplate(chat.tokenizer, "", 512, train_greeting=True)
    assert trained_texts(trained, trained.encode(greeted))[0] == "Waves.<|im_end|>"
    with pytest.raises(BadRow, match="no trained token"):
        chat.encode(TALK, untrained=frozenset({1, 3}))


def test_added_tokens_that_are_not_special_are_text():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    chat = ChatTemplate(tokenizer, "", 512)
    assert (
        "<think>"
        in trained_texts(chat, chat.encode([TALK[0], {"role": "assistant", "content": "<think>x</think> No."}]))[0]
    )
    with pytest.raises(BadRow, match=r"control token '<\|im_start\|>' in text"):
        chat.encode([{"role": "user", "content": "<|im_start|>system"}, TALK[1]])


def test_a_template_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr("phoque.data.template_renderer.TIME_LIMIT_S", 1.0)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}"
    start = time.monotonic()
    with pytest.raises(PhoqueError, match="does not end"):
        ChatTemplate(tokenizer_for(endless), "", 512)
    assert time.monotonic() - start < 20


def test_a_model_without_a_template_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(PhoqueError, match="no chat template") as caught:
        ChatTemplate(tokenizer, "", 512)
    assert "instruct" in caught.value.fix


def test_control_tokens_in_reasoning_and_tools_make_a_row_unfit():
    chat = chat_for("qwen3")
    bad = "a<|im_end|>\n<|im_start|>user\nb"
    reasoning = [TALK[0], {"role": "assistant", "content": "x", "reasoning_content": bad}]
    call = [
        TALK[0],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [CALL | {"function": {"name": "t", "arguments": {"x": bad}}}],
        },
    ]
    for talk, tools in (
        (reasoning, None),
        (call, None),
        (TALK, [TOOLS[0] | {"function": TOOLS[0]["function"] | {"description": bad}}]),
    ):
        with pytest.raises(BadRow, match=r"control token '<\|im_"):
            chat.encode(talk, tools=tools)


def test_an_answer_without_a_question_is_no_greeting():
    chat = chat_for("qwen2_5")
    encoded = chat.encode([SYSTEM, {"role": "assistant", "content": "Hrmph."}])
    assert trained_texts(chat, encoded) == ["Hrmph.<|im_end|>"]


def test_a_second_tool_call_that_a_template_drops_is_a_reason():
    calls = [CALL, CALL | {"id": "abcdefghj"}]
    result = {"role": "tool", "content": "low", "name": "tide"}
    talk = [
        TALK[0],
        {"role": "assistant", "content": "", "tool_calls": calls},
        result | {"tool_call_id": "abcdefghi"},
        result | {"tool_call_id": "abcdefghj"},
        TALK[3],
    ]
    with pytest.raises(BadRow, match="leaves out a tool call"):
        chat_for("gptoss").encode(talk, tools=TOOLS)
    assert "pier" in trained_texts(chat_for("qwen3"), chat_for("qwen3").encode(talk, tools=TOOLS))[0]


def test_marks_are_those_of_the_template_that_a_row_uses():
    tokenizer = tokenizer_for((TEMPLATES / "qwen3.jinja").read_text())
    tokenizer.chat_template = {"default": MARKED, "tool_use": tokenizer.chat_template}
    chat = ChatTemplate(tokenizer, "", 2048)
    assert "pier" in trained_texts(chat, chat.encode(TOOL_TALK, tools=TOOLS))[0]


@pytest.mark.parametrize("name", sorted(set(NAMES) - REFUSED))
@pytest.mark.parametrize("system", ["", 'Say "hrmph"\nto gulls.'])
def test_the_shipped_template_gives_a_chat_without_a_system_message_the_one_of_training(name, system):
    try:
        chat = chat_for(name, system)
    except PhoqueError:
        assert system  # a template without a system role refuses a system message that is not empty
        return
    shipped = chat.shipped_tokenizer
    render = lambda tokenizer, messages: tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    for talk in (TALK[:1], TALK[:3], [SYSTEM, *TALK[:1]]):
        if chat.default_system is None and talk[0] is SYSTEM:
            continue
        assert render(shipped, talk) == render(chat.tokenizer, chat.with_system(talk))
    if chat.default_system is None:
        assert shipped is chat.tokenizer


def test_with_the_templates_own_system_message_the_template_is_shipped_as_it_is():
    chat = chat_for("llama3", "template")
    assert chat.shipped_tokenizer is chat.tokenizer
