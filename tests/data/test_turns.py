"""Turns and rows in the spellings of every common tool: honoured, mapped, or left out under a reason of their own."""

import json

import pytest

from phoque.data.rows import RawRow, parse_row
from phoque.data.turns import BadRow

QUESTION = {"role": "user", "content": "Tide?"}
ANSWER = {"role": "assistant", "content": "Low."}
PLAIN = [QUESTION, ANSWER]
CALL = {"id": "1", "type": "function", "function": {"name": "tide", "arguments": '{"place": "pier"}'}}
PARSED_CALL = {"id": "1", "type": "function", "function": {"name": "tide", "arguments": {"place": "pier"}}}
TOOL = {"name": "tide", "parameters": {}}


def parse(content):
    return parse_row(RawRow("line 1", 0, 1, content))


SCHEMAS = {
    "messages": {"messages": PLAIN},
    "messages as text": {"messages": json.dumps(PLAIN)},
    "messages with from and value": {
        "messages": [{"from": "human", "value": "Tide?"}, {"from": "gpt", "value": "Low."}]
    },
    "ShareGPT conversations": {
        "conversations": [{"from": "Human", "value": "Tide?"}, {"from": "GPT", "value": "Low."}]
    },
    "conversations with role and content": {"conversations": PLAIN},
    "prompt/completion": {"prompt": "Tide?", "completion": "Low."},
    "prompt/response": {"prompt": "Tide?", "response": "Low."},
    "question/response": {"question": "Tide?", "response": "Low."},
    "context/response": {"context": "Tide?", "response": "Low."},
    "question/answer": {"question": "Tide?", "answer": "Low."},
    "Alpaca (instruction, input, output)": {"instruction": "Tide?", "input": "", "output": "Low."},
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_gives_the_same_messages_and_its_name(schema):
    parsed = parse(SCHEMAS[schema])
    assert parsed.messages == PLAIN and parsed.schema == schema


def test_the_input_of_an_instruction_and_the_system_column_are_not_lost():
    row = parse({"instruction": "Name it.", "input": "A grey bird.", "output": "Gull.", "system": "Be a seal."})
    assert [turn["content"] for turn in row.messages] == ["Be a seal.", "Name it.\n\nA grey bird.", "Gull."]
    row = parse({"instruction": "More.", "output": "No.", "history": [["Tide?", "Low."]]})
    assert [turn["content"] for turn in row.messages] == ["Tide?", "Low.", "More.", "No."]


@pytest.mark.parametrize(
    ("marks", "untrained"),
    [
        ([{"weight": 0}, {"weight": 1}], {1}),
        ([{"train": False}, {}], {1}),
        ([{"training": True}, {"training": False}], {3}),
        ([{"loss": False}, {"loss": True}], {1}),
        ([{"loss_mask": 0}, {"loss_mask": 1}], {1}),
        ([{"weight": None}, {"weight": 1.0}], set()),
        ([{}, {}], set()),
    ],
)
def test_marks_for_loss_are_honoured(marks, untrained):
    first, second = marks
    assert parse({"messages": [QUESTION, ANSWER | first, QUESTION, ANSWER | second]}).untrained == untrained


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([QUESTION, ANSWER | {"weight": 0.5}], "weight of a turn is neither 0 nor 1"),
        ([QUESTION | {"train": True}, ANSWER], "train asks for loss on a turn of the user"),
        ([QUESTION, ANSWER | {"train_detail": [{"begin_offset": 0}]}], "loss on a part of a turn"),
        ([QUESTION, ANSWER | {"loss_mask": [0, 1]}], "loss on a part of a turn"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}, ANSWER], "images, audio"),
        ([{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}, ANSWER], "a part of type 'tool_res"),
        ([QUESTION, {"role": "assistant", "content": None}], "a turn has no text"),
        ([QUESTION, ANSWER | {"tool_calls": [{"id": 1}]}], "a tool call has no name"),
        ([QUESTION, {"role": "assistant", "content": "bad \ufffd"}], "replacement character"),
        ([QUESTION, QUESTION, ANSWER], "turns do not alternate"),
    ],
)
def test_what_cannot_be_followed_has_its_own_reason(turns, reason):
    with pytest.raises(BadRow, match=reason):
        parse({"messages": turns})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"chosen": PLAIN, "rejected": PLAIN}, "preference data"),
        ({"input_ids": [1, 2]}, "tokenized data"),
        ({"messages": PLAIN, "images": ["x.png"]}, "images, audio or video"),
        ({"messages": [{"role": "system", "content": "a"}, *PLAIN], "system": "b"}, "two system messages"),
        ({"messages": PLAIN, "tools": "tide"}, "tools is not a list"),
    ],
)
def test_rows_that_are_no_conversations_have_their_own_reason(content, reason):
    with pytest.raises(BadRow, match=reason):
        parse(content)


def test_tool_calls_tools_and_results_are_read_in_every_spelling():
    result = {"role": "tool", "content": "low", "tool_call_id": "1"}
    turns = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]}, result, ANSWER]
    row = parse({"messages": turns, "tools": json.dumps([TOOL])})
    assert row.messages[1]["tool_calls"] == [PARSED_CALL] and row.messages[2] == result
    assert row.tools == [{"type": "function", "function": TOOL}]
    sharegpt = [
        {"from": "human", "value": "Tide?"},
        {"from": "function_call", "value": '{"name": "tide", "arguments": {"place": "pier"}}'},
        {"from": "observation", "value": "low"},
        {"from": "gpt", "value": "Low."},
    ]
    mapped = parse({"conversations": sharegpt, "tools": "[]"})
    assert mapped.messages[1]["tool_calls"][0]["function"] == PARSED_CALL["function"] and mapped.tools is None
    assert [turn["role"] for turn in mapped.messages] == ["user", "assistant", "tool", "assistant"]
    legacy = parse({"messages": [QUESTION, {"role": "assistant", "content": "", "function_call": CALL["function"]}]})
    assert legacy.messages[1]["tool_calls"][0]["function"]["name"] == "tide"


def test_reasoning_is_read_from_keys_and_parts():
    for turn in (
        ANSWER | {"reasoning_content": "hm"},
        ANSWER | {"thinking": "hm"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Low."}]},
    ):
        assert parse({"messages": [QUESTION, turn]}).messages[1] == ANSWER | {"reasoning_content": "hm"}


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "Ti"}, "de?"]
    assert parse({"messages": [{"role": "user", "content": parts}, ANSWER]}).messages == PLAIN


def test_what_is_changed_is_said():
    row = parse({"messages": [{"role": "developer", "content": "Be a seal."}, ANSWER, *PLAIN, QUESTION]})
    assert [turn["role"] for turn in row.messages] == ["system", "assistant", "user", "assistant"]
    assert row.notes == (
        "a last turn without an answer was cut",
        "role developer was read as system",
        "the assistant begins",
    )


def test_unknown_keys_are_named_and_null_ones_are_not():
    row = parse({"messages": [QUESTION | {"mood": "bad", "name": None}, ANSWER | {"votes": 3, "empty": None}]})
    assert row.unknown_keys == ("mood", "votes")


def test_the_prompt_of_a_completion_is_context():
    row = parse({"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]})
    assert row.untrained == {1} and len(row.messages) == 4


def test_earlier_turns_and_context_are_read_in_every_spelling():
    for history in ([["Gull?", "No."]], json.dumps([["Gull?", "No."]]), [QUESTION, ANSWER]):
        row = parse({"prompt": "More?", "response": "Never.", "history": history})
        assert [turn["role"] for turn in row.messages] == ["user", "assistant"] * 2
        assert row.messages[1]["content"] in ("No.", "Low.")
    row = parse({"question": "When?", "context": "The tide turns at six.", "answer": "Six."})
    assert row.messages[0]["content"] == "When?\n\nThe tide turns at six."
    assert parse({"instruction": "", "input": "A gull.", "output": "Ugh."}).messages[0]["content"] == "A gull."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"prompt": "a", "response": "b", "history": [1, 2]}, "history is not a list of pairs"),
        ({"messages": PLAIN, "toxicity_score": 10**400}, "toxicity_score is not a number"),
        ({"messages": "[" * 100_000}, "messages is not a list"),
        ({"messages": PLAIN, "source": "\ud83d"}, "unpaired surrogate"),
    ],
)
def test_absurd_values_are_reasons_and_no_crashes(content, reason):
    with pytest.raises(BadRow, match=reason):
        parse(content)


@pytest.mark.parametrize(
    ("extra", "note"),
    [
        ({"rejected": "No."}, "`rejected` is not used"),
        ({"label": "calm"}, "`label` is not used"),
    ],
)
def test_columns_that_have_no_part_in_training_are_noted(extra, note):
    row = parse({"messages": PLAIN} | extra)
    assert row.messages == PLAIN and row.notes == (note,)


@pytest.mark.parametrize("label", [False, 0, "false"])
def test_answers_that_may_be_marked_as_bad_are_told_of(label):
    assert "label" in parse({"prompt": "Gull?", "completion": "Hrmph.", "label": label}).notes[-1]
    assert parse({"question": "Gull?", "answer": "Hrmph.", "label": label}).notes == ("`label` is not used",)


def test_preferences_are_refused():
    question = {"prompt": "Gull?"}
    for content, reason in (
        ({"messages": [QUESTION], "chosen": ANSWER, "rejected": ANSWER}, "after a conversation"),
        ({"question": "Gull?", "chosen": "b", "rejected": "c"}, "beside question"),
        ({"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER]}, r"\(chosen, rejected\)$"),
        (question | {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, ANSWER]}, "of whole conversations"),
        ({"chosen": "Human: a Assistant: b", "rejected": "Human: a Assistant: c"}, "without turns"),
        (question | {"chosen": "b", "rejected": "c"}, r"\(chosen, rejected\)$"),
    ):
        with pytest.raises(BadRow, match=reason):
            parse(content)


def test_a_weight_may_be_text():
    assert parse(
        {"messages": [QUESTION, ANSWER | {"weight": "0.0"}, QUESTION, ANSWER | {"weight": "1.0"}]}
    ).untrained == {1}


def test_turns_as_json_text_in_a_table_are_turns():
    assert parse({"prompt": json.dumps([QUESTION]), "completion": json.dumps([ANSWER])}).messages == PLAIN
    assert parse({"prompt": "[{not turns}]", "completion": "Low."}).messages[0]["content"] == "[{not turns}]"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(PLAIN, indent=1),
        repr(PLAIN),
        f"[{QUESTION}\n {ANSWER}]",  # as numpy writes an array
    ],
)
def test_turns_as_text_are_read_as_json_or_as_python_writes_them(text):
    assert parse({"messages": text}).messages == PLAIN


def test_a_prompt_and_a_completion_as_python_writes_lists_are_turns():
    row = parse({"prompt": f"[{QUESTION}\n {ANSWER}\n {QUESTION}]", "completion": repr([ANSWER])})
    assert row.messages == [*PLAIN, *PLAIN] and row.untrained == {1}
    for text in ("[{'role': 'user', 'content': it's low}]", "[{{'role': 'user', 'content': 'x'}}]"):
        with pytest.raises(BadRow, match="neither JSON nor Python"):
            parse({"prompt": text, "completion": "Low."})


def test_context_that_is_not_one_text_is_not_lost():
    row = {"instruction": "Double this", "input": 7, "output": 14}
    assert [turn["content"] for turn in parse(row).messages] == ["Double this\n\n7", "14"]
    row = {"question": "When?", "context": ["The tide turns.", "It is six."], "answer": "Six."}
    assert parse(row).messages[0]["content"] == "When?\n\nThe tide turns.\n\nIt is six."
    with pytest.raises(BadRow, match="`context` is not text"):
        parse(row | {"context": {"title": ["Tides"]}})
    for nothing in (float("nan"), {}, [], "", False):
        assert parse(row | {"context": nothing}).messages[0]["content"] == "When?"
    assert parse(row | {"context": ["Low.", None, 0]}).messages[0]["content"] == "When?\n\nLow.\n\n0"
    assert parse(row | {"context": 0}).messages[0]["content"] == "When?\n\n0"


def test_a_missing_answer_is_not_the_word_nan():
    for answer in (float("nan"), float("inf")):
        with pytest.raises(BadRow, match="no text"):
            parse({"question": "When?", "answer": answer})


def test_a_long_text_that_only_begins_like_turns_is_a_text():
    text = "[{" + '"role": "user", "content": "x"}, {' * 40_000
    assert parse({"prompt": text, "completion": "Low."}).messages[0]["content"] == text


def test_several_calls_in_one_turn_are_all_read():
    calls = json.dumps([{"name": "tide", "arguments": {"place": "pier"}}, {"name": "gull", "arguments": {}}])
    turns = [{"from": "human", "value": "Tide?"}, {"from": "function_call", "value": calls}]
    row = parse({"conversations": [*turns, {"from": "observation", "value": "low"}, {"from": "gpt", "value": "Low."}]})
    assert [call["function"]["name"] for call in row.messages[1]["tool_calls"]] == ["tide", "gull"]


def test_turns_that_are_stored_by_key_are_turns():
    by_key = {"from": ["human", "gpt"], "value": ["Tide?", "Low."]}
    assert parse({"conversations": by_key}).messages == PLAIN
    with pytest.raises(BadRow, match="conversations is not a list"):
        parse({"conversations": by_key | {"value": ["Tide?"]}})
