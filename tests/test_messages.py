"""Chats as TRL, verl, ms-swift and ShareGPT have them: read, kept or refused, and never half read in silence."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atesd.data.splits import ProblemSets
from test_reading import by_text, every, jsonl, read, refusal

WHOLE = {"messages": "chat"}
SIDES = {"problem": "prompt", "solution": "completion"}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*turns: str, system: str = "") -> list[dict[str, Any]]:
    """Turns of the user and the assistant in turn."""
    messages = [said(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    return [said("system", system)] * bool(system) + messages


def answer(i: int) -> str:
    return f"a\n\n\\boxed{{{i}}}"


def twenty(tmp_path: Path, changed: dict[int, Any], name: str = "p.jsonl") -> str:
    """Twenty whole chats, some of them others."""
    return jsonl(tmp_path / name, [{"chat": changed.get(i, chat(f"p{i}", answer(i)))} for i in range(20)])


def notes(sets: ProblemSets) -> list[str]:
    return [note.split(": ", 1)[1] for note in sets.notes]


def test_a_chat_gives_the_question_and_its_answer(tmp_path):
    rows = [{"chat": chat(f"p{i}", answer(i))} for i in range(20)]
    sets = read(jsonl(tmp_path / "p.jsonl", rows), WHOLE)
    assert len(every(sets)) == 20
    assert by_text(sets)["p7"].reference == answer(7)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert every(read(str(tmp_path / "p.parquet"), WHOLE)) == every(sets)


@pytest.mark.parametrize(
    "form",
    [
        [{"from": "human", "value": "p4"}, {"from": "gpt", "value": answer(4)}],
        [said("user", [{"type": "text", "text": "p"}, {"type": "text", "text": "4"}]), said("assistant", answer(4))],
        [{**said("user", "p4"), "from": None, "value": None}, {**said("assistant", answer(4)), "tool_calls": None}],
        [{"role": None, "content": None, "from": "human", "value": "p4"}, {"from": "gpt", "value": answer(4)}],
    ],
)
def test_other_forms_of_a_chat_read_the_same_also_beside_each_other(tmp_path, form):
    assert every(read(twenty(tmp_path, {4: form}), WHOLE)) == every(read(twenty(tmp_path, {}, "q.jsonl"), WHOLE))


def test_a_system_message_is_refused_until_it_is_said_what_becomes_of_it(tmp_path):
    source = twenty(tmp_path, {i: chat(f"p{i}", answer(i), system="Be brief.") for i in range(3)})
    fault = "row 1: column 'chat' holds a system message, 'Be brief.' (data.system_message: keep puts it in front of"
    assert fault in refusal(source, WHOLE)
    kept = read(source, WHOLE, system_message="keep")
    assert by_text(kept)["Be brief.\n\np2"].reference == answer(2)
    assert notes(kept)[0].startswith("3 rows have a system message in column 'chat', which stands in front")
    dropped = read(source, WHOLE, system_message="drop")
    assert notes(dropped)[0].startswith("3 rows have a system message in column 'chat', which is not read")
    assert every(dropped) == every(read(twenty(tmp_path, {}, "q.jsonl"), WHOLE))


def test_earlier_turns_are_refused_until_they_are_dropped(tmp_path):
    source = twenty(tmp_path, {7: chat("hello", "hi", "p7", answer(7))})
    assert "row 8: column 'chat' holds turns before the last problem" in refusal(source, WHOLE)
    sets = read(source, WHOLE, earlier_turns="drop")
    assert notes(sets)[0].startswith("1 rows have earlier turns in column 'chat', which is not read")
    assert by_text(sets)["p7"].reference == answer(7)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "holds no list of messages but NoneType None"),
        ([], "holds no message of the user"),
        (["a"], "holds as message 1 a, not an object with role and content"),
        ([said("user", ["a"])], "holds as message 1 {'content': ['a'], 'role': 'user'}, whose role and"),
        ([said("user", [])], "holds as message 1 {'content': [], 'role': 'user'}, whose role and"),
        ([said("user", None)], "holds as message 1 {'content': None, 'role': 'user'}, whose role and"),
        ([said("user", [{"type": "image"}])], "holds as message 1 {'content': [{'type': 'image'}], "),
        ([*chat("p", "a"), said("assistant", "b")], "holds more than one answer of the assistant"),
        ([*chat("p"), said("tool", "b")], "holds as message 2 one of 'tool'; a role is system, user or assistant"),
        ([*chat("p"), said("system", "b")], "holds a system message behind another message"),
        ([said("assistant", "b")], "holds no message of the user"),
        ([said("user", "p"), said("assistant", "b", reasoning_content="c")], "holds as message 2 one with reasoning_"),
        ([said("user", " ")], "(user)' is empty"),
    ],
)
def test_what_is_no_chat_makes_a_bad_row(tmp_path, value, reason):
    message = refusal(twenty(tmp_path, {4: value}), WHOLE)
    assert "row 5: " in message
    assert reason in message


def test_a_chat_without_an_answer_has_no_reference(tmp_path):
    rows = [{"chat": chat(f"p{i}"), "answer": i} for i in range(20)]
    sets = read(jsonl(tmp_path / "p.jsonl", rows), {"messages": "chat", "answer": "answer"})
    assert "20 of 20 usable rows have no reference solution" in sets.notes[0]


def test_prompt_and_completion_may_be_chats_or_text_row_by_row(tmp_path):
    rows: list[dict[str, Any]] = [
        {"prompt": chat(f"p{i}"), "completion": [said("assistant", answer(i))]} for i in range(20)
    ]
    rows[3] = {"prompt": "p3", "completion": said("assistant", answer(3))}
    rows[4] = {"prompt": chat("p4"), "completion": answer(4)}
    sets = read(jsonl(tmp_path / "p.jsonl", rows), SIDES)
    plain = [{"prompt": f"p{i}", "completion": answer(i)} for i in range(20)]
    assert every(sets) == every(read(jsonl(tmp_path / "q.jsonl", plain), SIDES))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": chat("p", "a")}, "column 'prompt' ends with an answer of the assistant; name a column of whole"),
        ({"prompt": [said("system", "s")]}, "column 'prompt' holds no message of the user"),
        ({"prompt": chat("p", system="s")}, "column 'prompt' holds a system message, 's'"),
        ({"completion": chat("p", "a")}, "column 'completion' holds messages of user, assistant; a solution is one"),
        ({"completion": [said("assistant", None)]}, "column 'completion' holds as message 1 "),
    ],
)
def test_a_side_of_a_chat_that_holds_the_other_is_a_bad_row(tmp_path, change, reason):
    rows = [{"prompt": chat(f"p{i}"), "completion": [said("assistant", answer(i))]} for i in range(20)]
    rows[4].update(change)
    assert f"row 5: {reason}" in refusal(jsonl(tmp_path / "p.jsonl", rows), SIDES)


VERL = {"problem": "prompt", "solution": "extra_info.answer", "answer": "reward_model.ground_truth"}


def verl(i: int) -> dict[str, Any]:
    marked = {"answer": f"Twice.\n#### {i}", "index": i}
    return {"prompt": chat(f"p{i}"), "reward_model": {"style": "rule", "ground_truth": str(i)}, "extra_info": marked}


def test_a_path_reads_into_a_column_of_groups(tmp_path):
    rows = [verl(i) for i in range(20)]
    sets = read(jsonl(tmp_path / "p.jsonl", rows), VERL)
    assert by_text(sets)["p7"].reference == "Twice.\n\nFinal answer: \\boxed{7}"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert every(read(str(tmp_path / "p.parquet"), VERL)) == every(sets)


def test_a_path_that_leads_nowhere_is_named(tmp_path):
    rows = [verl(i) for i in range(20)]
    assert "no column 'reward.ground_truth', which data.columns.answer names" in refusal(
        jsonl(tmp_path / "p.jsonl", rows), {**VERL, "answer": "reward.ground_truth"}
    )
    del rows[4]["reward_model"]["ground_truth"], rows[4]["extra_info"]["answer"]
    assert "row 5: no answer can be found: no closed \\boxed{} in the solution, and 'reward_model.ground" in refusal(
        jsonl(tmp_path / "p.jsonl", rows), VERL
    )
