"""`atesd init`: the recipe that it writes for a file trains as it stands; what cannot be trained on is said."""

import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from atesd.build import build, close
from atesd.cli.commands import app
from atesd.cli.init import DEFAULT_MODEL, Target, recipe_text, target_of, write_recipe
from atesd.cli.plan import budget_line, plan_lines
from atesd.config import Config, config_from_mapping, load_config, parse_yaml
from atesd.data.survey import survey
from atesd.errors import ConfigError, DataError, ModelError
from test_sources import grade_school, jsonl
from tiny import tiny_folder

COUNT = 120


def steps(i: int) -> str:
    return f"Take {i}.\nDouble it.\nRead it.\nSo \\boxed{{{2 * i}}}."


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


FORMS: dict[str, Any] = {
    "plain": lambda i: {"problem": f"p{i}", "solution": steps(i)},
    "gsm8k": grade_school,
    "math": lambda i: {"problem": f"p{i}", "solution": steps(i), "level": f"Level {i % 5}", "type": "Algebra"},
    "messages": lambda i: {"messages": [said("system", "Go."), said("user", f"p{i}"), said("assistant", steps(i))]},
    "sides": lambda i: {"prompt": [said("user", parts(f"p{i}"))], "completion": [said("assistant", steps(i))]},
    "verl": lambda i: {
        "prompt": [said("user", f"p{i}")],
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "extra_info": {"answer": f"a.\nb.\n#### {i}", "index": i},
    },
    "sharegpt": lambda i: {
        "conversations": [{"from": "human", "value": f"p{i}"}, {"from": "gpt", "value": steps(i)}],
        "id": f"n{i}",
    },
    "columns": lambda i: {
        "Question": f"p{i}",
        "Rationale": "a\nb\nc",
        "final_answer": i,
        "difficulty": i % 4,
        "tag": "x",
    },
}
READ: dict[str, dict[str, Any]] = {
    "plain": {},
    "gsm8k": {"preset": "gsm8k"},
    "math": {"preset": "math"},
    "messages": {"columns": {"messages": "messages"}, "system_message": "drop"},
    "sides": {"columns": {"problem": "prompt", "solution": "completion"}},
    "verl": {
        "columns": {"problem": "prompt", "solution": "extra_info.answer", "answer": "reward_model.ground_truth"},
    },
    "sharegpt": {"columns": {"messages": "conversations", "id": "id"}},
    "columns": {
        "columns": {
            "problem": "Question",
            "solution": "Rationale",
            "answer": "final_answer",
            "difficulty": "difficulty",
        }
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("init") / "model"))


def rows(form: str, count: int = COUNT) -> list[dict[str, Any]]:
    return [FORMS[form](i) for i in range(count)]


def written(tmp_path: Path, sources: str | Sequence[str], model: str) -> Config:
    """The config of the recipe that is written for the sources."""
    out = tmp_path / "out.yaml"
    write_recipe([sources] if isinstance(sources, str) else sources, model, out)
    return load_config(str(out))


def dry_run(config: Config) -> list[str]:
    """What `atesd train --dry-run` builds and says, but for its last part, the same for all forms."""
    components = build(config)
    try:
        return list(takewhile(lambda line: not line.startswith("exposure decisions"), plan_lines(components)))
    finally:
        close(components)


@pytest.mark.parametrize("form", FORMS)
def test_the_recipe_of_a_file_passes_the_dry_run(tmp_path, model, form):
    source = jsonl(tmp_path / "p.jsonl", rows(form))
    config = written(tmp_path, source, model)
    assert survey([source]).settings == {"source": source, **READ[form]}
    lines = dry_run(config)
    assert "rows skipped: 0" in lines
    assert sum(map(int, (part.split()[1] for part in lines[0].removeprefix("problems: ").split(", ")))) == COUNT


def test_the_budget_of_a_written_recipe_suffices_by_the_rule_of_the_audit(tmp_path, model):
    config = written(tmp_path, jsonl(tmp_path / "p.jsonl", rows("plain")), model)
    assert config.exposure.kind == "learned"
    assert "too few" not in budget_line(config)


def test_parquet_several_files_and_a_byte_order_mark_are_looked_at_alike(tmp_path, model):
    pq.write_table(pa.Table.from_pylist(rows("messages")[:60]), tmp_path / "a.parquet")
    text = "\n".join(map(json.dumps, rows("messages")[60:]))
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    names = [str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl")]
    config = written(tmp_path, names, model)
    assert config.data.sources == tuple(names)
    assert config.model.system_prompt == "Go."
    assert len([line for line in dry_run(config) if ": 60 usable rows: " in line]) == 2


def test_system_messages_that_differ_are_kept_and_earlier_turns_are_dropped_and_said(tmp_path):
    some = rows("messages")
    some[3]["messages"][0]["content"] = "Wait."
    some[4]["messages"][1:1] = [said("user", "hello"), said("assistant", "hi")]
    found = survey([jsonl(tmp_path / "p.jsonl", some)])
    assert (found.settings["system_message"], found.settings["earlier_turns"], found.system) == ("keep", "drop", "")
    assert found.reading.bad == ()


def test_a_system_message_is_the_model_s_only_if_every_chat_of_every_row_has_it(tmp_path, monkeypatch):
    some = rows("messages")
    some[-1]["messages"][0]["content"] = "Wait."
    monkeypatch.setattr("atesd.data.survey._LOOKED_AT", len(some) - 1)
    found = survey([jsonl(tmp_path / "p.jsonl", some)])
    assert (found.settings["system_message"], found.system) == ("keep", "")
    assert found.reading.bad == ()


def test_the_window_has_room_for_the_system_message_that_all_chats_share(tmp_path, model):
    windows = []
    for name, text in (("short", "Go."), ("long", "Go on. " * 300)):
        some = rows("messages")
        for one in some:
            one["messages"][0]["content"] = text
        (tmp_path / name).mkdir()
        config = written(tmp_path / name, jsonl(tmp_path / f"{name}.jsonl", some), model)
        windows.append(config.model.max_context_tokens)
    assert windows[1] > windows[0]


def test_nulls_and_empty_lists_are_bad_rows_that_the_recipe_skips_and_counts(tmp_path, model):
    some = rows("messages")
    some[0]["messages"], some[4]["messages"], some[5]["messages"][1]["content"] = [], None, None
    config = written(tmp_path, jsonl(tmp_path / "p.jsonl", some), model)
    assert config.data.on_bad_row == "skip"
    said_of_them = "3 rows, such as row 1: column 'messages' holds no message of the user"
    assert said_of_them in (tmp_path / "out.yaml").read_text("utf-8")


def test_copies_of_a_problem_are_left_out_and_counted_however_many_they_are(tmp_path, model):
    config = written(tmp_path, jsonl(tmp_path / "p.jsonl", [FORMS["plain"](i // 4) for i in range(160)]), model)
    assert config.data.on_bad_row == "skip"
    assert "40 usable rows, 120 bad ones." in (tmp_path / "out.yaml").read_text("utf-8")


def test_an_answer_that_is_a_list_of_one_is_found(tmp_path):
    some = [{"problem": f"p{i}", "solution": "a\nb", "answer": [str(i)]} for i in range(40)]
    assert survey([jsonl(tmp_path / "p.jsonl", some)]).settings["columns"] == {"answer": "answer"}


def stated(i: int, boxed: int, answer: int) -> dict[str, Any]:
    return {"problem": f"p{i}", "solution": f"a\nb\n\\boxed{{{boxed}}}", "answer": answer}


def test_an_answer_column_is_read_though_some_solutions_come_to_another_answer(tmp_path):
    found = survey([jsonl(tmp_path / "p.jsonl", [stated(i, 999 if i % 10 == 3 else i, i) for i in range(60)])])
    assert found.settings["columns"] == {"answer": "answer"}
    assert (len(found.reading.entries), len(found.reading.bad)) == (54, 6)


def test_a_column_that_most_solutions_contradict_holds_no_answers(tmp_path):
    found = survey([jsonl(tmp_path / "p.jsonl", [stated(i, i, i if i % 3 == 0 else -1) for i in range(60)])])
    assert (found.settings.get("columns"), len(found.reading.entries)) == (None, 60)


def test_of_two_answer_columns_that_with_fewer_contradictions_is_read(tmp_path):
    some = [{**stated(i, i, i if i % 3 else -1), "final_answer": i} for i in range(60)]
    assert survey([jsonl(tmp_path / "p.jsonl", some)]).settings["columns"] == {"answer": "final_answer"}


def openr1(i: int, verified: bool) -> dict[str, Any]:
    marks = {"correctness_math_verify": [verified], "is_reasoning_complete": [True]}
    return {**stated(i, i, i), "generations": [f"x\ny\n\\boxed{{{i}}}"], **marks}


@pytest.mark.parametrize("share", [10, 2])  # one row of so many is filtered
def test_a_preset_is_read_though_its_filter_leaves_rows_out(tmp_path, share):
    checked = [{**FORMS["plain"](i), "correct": bool(i % share)} for i in range(60)]
    verified = [openr1(i, bool(i % share)) for i in range(60)]
    for name, some in (("openthoughts-114k", checked), ("openr1", verified)):
        found = survey([jsonl(tmp_path / "p.jsonl", some)])
        assert found.settings.get("preset") == name
        assert len(found.reading.entries) == 60 - 60 // share
        assert f"{60 // share} rows left out, as it keeps those " in found.found[1]


def test_a_preset_that_keeps_no_row_is_not_read(tmp_path):
    found = survey([jsonl(tmp_path / "p.jsonl", [{**FORMS["plain"](i), "correct": "yes"} for i in range(60)])])
    assert ("preset" in found.settings, len(found.reading.entries)) == (False, 60)


def test_two_forms_in_one_file_give_the_rows_of_the_commoner_one(tmp_path):
    found = survey([jsonl(tmp_path / "p.jsonl", [*rows("plain")[:80], *rows("messages")[80:]])])
    assert (len(found.reading.entries), len(found.reading.bad)) == (80, 40)


@pytest.mark.parametrize(
    ("some", "message"),
    [
        (
            [{"name": f"n{i}", "price": i} for i in range(50)],
            r"Looked for a column of chats, for the columns of openthoughts-opsd, .*, and for columns of these names: "
            r"problem: problem, question, .*Found: 'name' \(str, such as 'n0'\), 'price' \(int, such as '0'\)\. Say",
        ),
        (
            [{"question": f"q{i}", "comment": "x"} for i in range(50)],
            r"The likeliest reading fails: row 1: no answer can be found",
        ),
        ([{"question": f"q{i}", "answer": i} for i in range(50)], r"fails: no row has a solution\."),
        (rows("plain", 12), r"12 usable rows; a run needs at least 20"),
        (
            [*rows("plain", 30), *[{"problem": ""}] * 40],
            r"40 of 70 rows cannot be used, the first:\n",
        ),
        ([b"{", b"nonsense"], r"no row can be read; the first: .*: row 1: not JSON"),
        ([], "there are no rows"),
        ([{"problem": None}, {}], r"found no problems .* Found: \."),
    ],
)
def test_a_file_without_hope_is_told_what_was_looked_for_and_what_was_found(tmp_path, model, some, message):
    out = tmp_path / "out.yaml"
    with pytest.raises(DataError, match=message):
        write_recipe([jsonl(tmp_path / "p.jsonl", some)], model, out)
    assert not out.exists()


def test_a_table_without_types_is_refused_with_the_line_that_converts_it(tmp_path):
    (tmp_path / "p.csv").write_text("problem,solution\n", "utf-8")
    with pytest.raises(DataError, match=r"cannot read a '.csv' file, .*: pandas.read_csv\(FILE, dtype=str\).to_json"):
        survey([str(tmp_path / "p.csv")])


def test_nothing_is_overwritten(tmp_path, model):
    source, out = jsonl(tmp_path / "p.jsonl", rows("plain")), tmp_path / "out.yaml"
    out.write_text("mine", "utf-8")
    with pytest.raises(ConfigError, match=r"out\.yaml exists, and nothing was overwritten; name another"):
        write_recipe([source], model, out)
    out.unlink()
    out.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="exists"):
        write_recipe([source], model, out)
    with pytest.raises(ConfigError, match=r"a recipe's name ends in \.yaml"):
        write_recipe([source], model, tmp_path / "out.json")


def test_the_verb_names_the_recipe_after_the_file_and_says_what_to_do_next(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "sums.jsonl", rows("columns"))
    result = CliRunner().invoke(app, ["init", "sums.jsonl", "--model", model])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "found: problems in 'Question'; solutions in 'Rationale'; answer in 'final_answer'; "
        "difficulty in 'difficulty'; not used: tag",
        "rows: 120 usable, 0 not",
        result.output.splitlines()[2],
        "written: sums.yaml",
        *(
            f"next: atesd {verb}"
            for verb in ("preview sums.yaml", "train sums.yaml --dry-run", "profile sums.yaml", "audit sums.yaml")
        ),
        "next: atesd train sums.yaml",
    ]
    text = (tmp_path / "sums.yaml").read_text("utf-8")
    assert text.startswith("# sums.jsonl: ")
    assert len([line for line in text.splitlines() if "#" in line]) >= 10


def of_default(tmp_path: Path, some: list[dict[str, Any]]) -> Config:
    """The config of a recipe for the model that is not at hand."""
    text = recipe_text(survey([jsonl(tmp_path / "p.jsonl", some)]), target_of(DEFAULT_MODEL), tmp_path / "x.yaml")
    assert "tokens, guessed from 3 characters each" in text
    return config_from_mapping(parse_yaml(text, "x.yaml"))


def test_without_a_tokenizer_lengths_are_guessed_from_characters(tmp_path):
    short = of_default(tmp_path, rows("plain"))
    assert (short.model.path, short.model.dtype, short.train.batch_size) == (DEFAULT_MODEL, "bfloat16", 32)
    assert short.model.student_template == {"enable_thinking": False}
    long = of_default(tmp_path, [{**row, "solution": "x " * 6000 + row["solution"]} for row in rows("plain")])
    assert short.sampling.completion_tokens == 512
    assert long.sampling.completion_tokens == 4096
    assert long.model.max_context_tokens > 12_000 // 3 + 4096


def test_what_most_references_stay_below_is_not_read_from_the_longest(tmp_path):
    some = [
        {**row, "solution": "x " * (3000 if i < 20 else 300) + row["solution"]}
        for i, row in enumerate(rows("plain", 1000))
    ]
    found, path = survey([jsonl(tmp_path / "p.jsonl", some)]), tmp_path / "x.yaml"
    text = recipe_text(found, Target(DEFAULT_MODEL, None, None, None), path)
    usual = (600 + len(steps(500))) // 3  # of 3 characters; the 2 % of ten times the length are no 5 %
    assert f"# 95 % of the references have up to {usual} tokens;" in text
    assert "sampling: {completion_tokens: 512}" in text
    small = recipe_text(found, Target(DEFAULT_MODEL, None, None, 768), path)
    assert "max_context_tokens: 768" in small
    assert "sampling: {completion_tokens: 384}" in small  # half the window is left for the contexts


def test_the_window_follows_the_longest_row_also_where_its_characters_have_many_bytes(tmp_path, model):
    # The tiny tokenizer has a token for each byte it does not know: 400 signs of 3 bytes are longer than 600 letters.
    long = {"problem": "\u7b97" * 400, "solution": steps(0)}
    usual = [{"problem": f"{i} " + "x" * 600, "solution": steps(i)} for i in range(COUNT)]
    config = written(tmp_path, jsonl(tmp_path / "p.jsonl", [*usual, long]), model)
    components = build(config)
    try:
        encoder, renderer = components.encoder, components.renderer
        all_of_them = [
            p for name in ("train", "probe", "validation", "test") for p in getattr(components.problems, name)
        ]
        longest = max(len(encoder.student(renderer.student(problem))) for problem in all_of_them)
        assert components.problems.skipped == ()
        assert config.model.max_context_tokens >= longest + config.sampling.completion_tokens
        assert config.model.max_context_tokens % 256 == 0
    finally:
        close(components)


def test_what_becomes_of_longer_rows_stands_beside_the_window(tmp_path, model):
    written(tmp_path, jsonl(tmp_path / "p.jsonl", rows("plain")), model)
    text = (tmp_path / "out.yaml").read_text("utf-8")
    assert "tokens. Of a longer one the last segments are\n" in text
    assert "is a guess until `atesd profile` has measured them." in text


def test_a_large_file_has_the_default_shares_and_a_small_one_more_probes(tmp_path):
    large = of_default(tmp_path, rows("plain", 2300)).data
    small = of_default(tmp_path, rows("plain")).data
    assert large.shares.probe == 0.03
    assert (large.probe_size, large.validation_size) == (64, 151)
    assert small.shares.probe == 0.15
    assert small.probe_size > 10


def test_few_probes_are_read_by_the_signal_with_less_noise(tmp_path):
    assert of_default(tmp_path, rows("plain", 1000)).credit.progress_signal == "probe_success"
    assert of_default(tmp_path, rows("plain")).credit.progress_signal == "probe_gain"


@pytest.mark.parametrize(("path", "message"), [("./nowhere", "neither a folder nor a hub"), ("a/b/c", "neither a fol")])
def test_a_model_that_cannot_be_is_refused_before_anything_is_written(tmp_path, path, message):
    with pytest.raises(ModelError, match=message):
        write_recipe([jsonl(tmp_path / "p.jsonl", rows("plain"))], path, tmp_path / "out.yaml")
    assert not (tmp_path / "out.yaml").exists()
