"""Run folders: the lock, the rows, what a resume keeps, and what it refuses."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atesd.config import Config, config_from_mapping, with_overrides, yaml_value
from atesd.errors import RunError
from atesd.models.processor import attention_of
from atesd.rows import SampleRow
from atesd.runs import RunFolder, new_manifest, write_atomic

CONFIG = config_from_mapping({"train": {"num_updates": 50, "seed": 7}, "exposure": {"kind": "fixed"}})


def begin(path: Path, config: Config = CONFIG) -> RunFolder:
    manifest = new_manifest(config, data_fingerprint="d1", command=["atesd", "train", "micro"], threads=1)
    return RunFolder.create(path, config, manifest)


def changed(**groups: dict[str, Any]) -> Config:
    written = ((f"{group}.{name}", value) for group, some in groups.items() for name, value in some.items())
    return with_overrides(CONFIG, [f"{path}={yaml_value(value)}" for path, value in written])


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return begin(tmp_path / "run")


def decision(update: int, logged_at: int, status: str = "finished") -> dict[str, Any]:
    return {"update": update, "logged_at": logged_at, "status": status}


# Making and opening


def test_a_created_run_opens_with_the_same_config_and_identity(run: RunFolder):
    again = RunFolder.open(run.path)
    assert (again.config, again.run_id, again.manifest) == (CONFIG, run.run_id, run.manifest)


def test_two_runs_never_share_an_identity(tmp_path: Path):
    assert begin(tmp_path / "a").run_id != begin(tmp_path / "b").run_id


def test_the_manifest_says_what_would_be_needed_to_repeat_the_run(run: RunFolder):
    manifest = run.manifest
    assert manifest["seed"] == 7
    assert manifest["data_fingerprint"] == "d1"
    assert manifest["command"] == ["atesd", "train", "micro"]
    assert manifest["host"] == socket.gethostname()
    assert manifest["threads"] == 1
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert manifest["versions"]["torch"]
    assert manifest["cpu"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", manifest["started"])


def test_the_commit_is_the_one_git_names(run: RunFolder):
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if answer.returncode or "site-packages" in str(sys.modules["atesd.runs"].__file__):
        pytest.skip("not a checkout")
    assert run.manifest["commit"].removesuffix("+changes") == answer.stdout.strip()


def test_a_second_run_does_not_begin_in_the_same_folder(run: RunFolder):
    with pytest.raises(RunError, match="already holds a run"):
        begin(run.path)


def test_a_folder_with_other_files_is_refused_and_left_as_it_was(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(RunError, match=r"not empty \(config.yaml\)"):
        begin(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_a_creation_that_was_killed_before_its_manifest_can_be_done_again(run: RunFolder):
    (run.path / "manifest.json").unlink()
    assert not RunFolder.exists(run.path)
    assert begin(run.path).run_id != run.run_id


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected manifest.json"),
        ("{", "not valid JSON"),
        ("[]", "expected 'atesd-run-1'"),
        ('{"format": "2"}', "format '2'"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_with_what_was_expected(tmp_path: Path, content: str | None, message: str):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(RunError, match=re.escape(message)):
        RunFolder.open(tmp_path)


def test_a_missing_folder_and_a_file_are_told_apart(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="no such folder"):
        RunFolder.open(tmp_path / "absent")
    with pytest.raises(RunError, match="not a folder"):
        RunFolder.open(tmp_path / "file")
    with pytest.raises(RunError, match="cannot make the run folder"):
        begin(tmp_path / "file" / "run")


def test_runs_is_imported_without_torch():
    code = "import sys, atesd.runs; assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_final_model_is_an_adapter_only_under_lora(tmp_path: Path, run: RunFolder):
    lora = begin(tmp_path / "lora", changed(model={"lora": {}}))
    assert (run.final.name, lora.final.name) == ("model", "adapter")


# The lock


def holder(run: RunFolder, then: str) -> subprocess.Popen[str]:
    """Another process that takes the lock, says so, and goes on with `then`."""
    code = f"""
        import os, sys, time
        from atesd.runs import RunFolder
        with RunFolder.open({str(run.path)!r}).lock():
            {then}
            print("locked", flush=True)
            sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def close(process: subprocess.Popen[str]) -> None:
    process.communicate()


def test_a_second_process_is_told_who_owns_the_run(run: RunFolder):
    process = holder(run, "pass")
    owner = rf"process {process.pid} on {re.escape(socket.gethostname())} since \d{{4}}-"
    with pytest.raises(RunError, match=owner), run.lock():
        pass
    close(process)
    with run.lock():
        assert json.loads((run.path / ".owner.json").read_text())["pid"] == os.getpid()


def test_the_lock_of_a_killed_process_blocks_nobody(run: RunFolder):
    process = holder(run, "pass")
    process.send_signal(signal.SIGKILL)
    close(process)
    assert (run.path / ".owner.json").exists()
    with run.lock():
        pass


def test_a_worker_that_outlives_its_killed_trainer_does_not_hold_the_lock(run: RunFolder):
    # The forked child inherits the descriptor; it must not inherit the lock.
    process = holder(run, "os.fork() or (os.close(0), os.close(1), os.close(2), time.sleep(3), os._exit(0))")
    process.send_signal(signal.SIGKILL)
    close(process)
    with run.lock():
        pass


def test_an_owner_file_alone_is_no_lock_and_a_lock_needs_no_owner_file(run: RunFolder):
    (run.path / ".owner.json").write_text('{"pid": 1, "host": "elsewhere", "since": "long ago"}')
    with run.lock(), pytest.raises(RunError, match=f"process {os.getpid()} "), run.lock():
        pass
    with FileLock(run.path / ".lock"), pytest.raises(RunError, match="another process"), run.lock():
        pass


def test_a_run_is_created_under_the_lock(run: RunFolder):
    (run.path / "manifest.json").unlink()
    with run.lock(), pytest.raises(RunError, match="in use by process"):
        begin(run.path)


def test_the_lock_ends_with_an_exception(run: RunFolder):
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    try:
        with FileLock(run.path / ".lock", timeout=0):
            assert not (run.path / ".owner.json").exists()
    except Timeout:
        pytest.fail("still locked")


# Rows

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
# Not the keys of a row, whose types are checked: hypothesis takes words that stand in the code.
NAMES = st.text().filter(lambda name: name not in SampleRow.__annotations__)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(written=st.lists(st.dictionaries(NAMES, VALUES, max_size=4), max_size=4), torn=st.binary(max_size=9))
def test_rows_are_read_as_they_were_written_even_after_a_torn_line(run: RunFolder, written: list[Any], torn: bytes):
    (run.path / "samples.jsonl").unlink(missing_ok=True)
    rows = [{**row, "update": number} for number, row in enumerate(written)]
    for row in rows:
        with (run.path / "samples.jsonl").open("ab") as file:
            file.write(torn.replace(b"\n", b""))
        run.append("samples", row)
    assert run.rows("samples") == rows


def test_a_row_is_in_the_file_as_soon_as_append_returns(run: RunFolder):
    run.append("metrics", {"update": 0, "loss": 0.1})
    assert (run.path / "metrics.jsonl").read_text() == '{"update": 0, "loss": 0.1}\n'


def test_a_run_without_rows_has_none(run: RunFolder):
    assert run.rows("decisions") == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"update": 0, "loss": math.nan}, "metrics row: loss is nan"),
        ({"update": 0, "seconds": {"sample": math.inf}}, "metrics row: seconds.sample is inf"),
        ({"update": 0, "series": [1.0, [-math.inf]]}, "metrics row: series[1][0] is -inf"),
        ({"update": 0, "by": {2: 0.5}}, "metrics row: by has the key 2 of type int"),
        ({"update": 0, "path": Path("x")}, "metrics row: path is a PosixPath"),
        ({"loss": 0.1}, "metrics row: update is None, expected an integer"),
        ({"update": True}, "metrics row: update is True, expected an integer"),
    ],
)
def test_what_strict_json_cannot_hold_is_refused_by_name(run: RunFolder, row: dict[str, Any], message: str):
    with pytest.raises(RunError, match=re.escape(message)):
        run.append("metrics", row)
    assert run.rows("metrics") == []


def test_a_decision_row_needs_a_known_status(run: RunFolder):
    with pytest.raises(RunError, match="status is 'open', expected finished or pending"):
        run.append("decisions", decision(0, 4, "open"))


@pytest.mark.parametrize("damage", [b"{}x", b"", b"\xff", b"[1]", b'{"loss": NaN}'])
def test_a_damaged_line_is_named_by_file_and_number(run: RunFolder, damage: bytes):
    (run.path / "metrics.jsonl").write_bytes(b'{"update": 0}\n' + damage + b'\n{"update": 2}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl: line 2 is damaged"):
        run.rows("metrics")


def test_sync_accepts_a_run_with_some_kinds_of_rows_missing(run: RunFolder):
    run.append("metrics", {"update": 0})
    run.sync()
    assert sorted(path.name for path in run.path.glob("*.jsonl")) == ["metrics.jsonl"]


# Cutting back


def test_truncating_keeps_what_the_checkpoint_knows_and_drops_what_will_be_written_again(run: RunFolder):
    for update in range(6):
        run.append("metrics", {"update": update})
    for update in (0, 2, 4, 6):
        run.append("evaluations", {"update": update})
        run.append("samples", {"update": update})
    for row in (decision(0, 3), decision(1, 4), decision(2, 3, "pending")):
        run.append("decisions", row)
    dropped = run.truncate_after(4)
    assert [row["update"] for row in run.rows("metrics")] == [0, 1, 2, 3]
    assert [row["update"] for row in run.rows("evaluations")] == [0, 2, 4]
    assert [row["update"] for row in run.rows("samples")] == [0, 2]
    assert run.rows("decisions") == [decision(0, 3)]
    assert dropped == {"metrics": 2, "decisions": 2, "evaluations": 1, "samples": 2}


def test_truncating_to_nothing_drops_the_evaluation_of_the_base_model_too(run: RunFolder):
    run.append("evaluations", {"update": 0})
    run.append("metrics", {"update": 0})
    assert run.truncate_after(0) == {"metrics": 1, "decisions": 0, "evaluations": 1, "samples": 0}
    assert run.rows("evaluations") == []


def test_truncating_removes_a_torn_line_and_leaves_no_temporary_file(run: RunFolder):
    run.append("metrics", {"update": 0})
    whole = (run.path / "metrics.jsonl").read_bytes()
    (run.path / "metrics.jsonl").write_bytes(whole + b'{"upd')
    run.truncate_after(1)
    assert (run.path / "metrics.jsonl").read_bytes() == whole
    assert not list(run.path.glob(".*.tmp"))


def test_a_cut_that_drops_nothing_does_not_touch_the_file(run: RunFolder):
    run.append("metrics", {"update": 0, "loss": 1e-7, "text": "\u00e9\u202e"})
    before = (run.path / "metrics.jsonl").stat()
    run.truncate_after(1)
    assert (run.path / "metrics.jsonl").stat().st_ino == before.st_ino


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_atomic(tmp_path / "file", b"old")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


# Resuming


def test_the_same_config_resumes_and_permitted_changes_are_told(run: RunFolder):
    assert run.check_config(CONFIG) == []
    longer = changed(train={"num_updates": 80, "keep_checkpoints": 5}, evaluation={"samples": 4})
    assert run.check_config(longer) == [
        "train.num_updates: 50 -> 80",
        "train.keep_checkpoints: 3 -> 5",
        "evaluation.samples: 2 -> 4",
    ]


@pytest.mark.parametrize("model", [{}, {"dtype": "bfloat16", "lora": {"rank": 8}}])
def test_a_run_that_recorded_the_former_default_of_attention_goes_on_with_it(tmp_path: Path, model: dict[str, Any]):
    run = begin(tmp_path / "former", changed(model=model))
    written = run.path / "config.yaml"
    assert "attention: null" in written.read_text("utf-8")
    written.write_text(written.read_text("utf-8").replace("attention: null", "attention: sdpa"), "utf-8")
    former = RunFolder.open(run.path)
    assert former.check_config(changed(model=model)) == []
    assert attention_of(former.continued(changed(model=model)).model) == "sdpa"
    with pytest.raises(RunError, match=r"model\.attention: (sdpa|None) -> eager"):
        former.check_config(changed(model={**model, "attention": "eager"}))


def test_every_other_change_is_refused_with_old_and_new_value(run: RunFolder):
    other = changed(train={"seed": 8}, loss={"clip": "none"}, model={"lora": {"rank": 8}})
    with pytest.raises(RunError) as caught:
        run.check_config(other)
    for line in ("train.seed: 7 -> 8", "loss.clip: per_token -> none", "model.lora.rank: (unset) -> 8"):
        assert line in str(caught.value)


def test_a_run_may_grow_but_not_shrink(run: RunFolder):
    with pytest.raises(RunError, match=r"train.num_updates: 50 -> 49 \(it may only grow\)"):
        run.check_config(changed(train={"num_updates": 49}))


def test_changed_problems_are_refused(run: RunFolder):
    run.check_data("d1")
    with pytest.raises(RunError, match="fingerprint d2, recorded d1"):
        run.check_data("d2")


def test_a_resume_is_recorded_beside_the_session_that_was_killed(run: RunFolder):
    longer = changed(train={"num_updates": 80})
    assert run.begin_session(longer, command=["again"], updates_done=25, threads=1) == ["train.num_updates: 50 -> 80"]
    run.end_session("finished")
    first, second = run.manifest["sessions"]
    assert (first["status"], first["ended"]) == ("killed", None)
    assert (second["status"], second["updates_done"], second["command"]) == ("finished", 25, ["again"])
    assert second["ended"] == run.manifest["ended"] is not None
    assert run.manifest["status"] == "finished"
    assert run.config == longer


def test_a_stopped_session_keeps_its_status(run: RunFolder):
    run.end_session("stopped")
    run.begin_session(CONFIG, command=[], updates_done=3, threads=1)
    assert [session["status"] for session in run.manifest["sessions"]] == ["stopped", "running"]
    assert (run.manifest["status"], run.manifest["ended"]) == ("running", None)


def test_what_ends_bit_exactness_is_told(tmp_path: Path):
    config = changed(exposure={"kind": "learned"}, train={"learning_rate_schedule": "cosine"})
    run = begin(tmp_path / "run", config)
    manifest = run.manifest
    manifest["sessions"][0]["versions"]["torch"] = "2.0.0"
    write_atomic(run.path / "manifest.json", json.dumps(manifest).encode())
    longer = config.model_copy(update={"train": config.train.model_copy(update={"num_updates": 80})})
    notes = run.begin_session(longer, command=[], updates_done=1, threads=2)
    for said in (
        "exposure.policy.entropy_cost depends on train.num_updates",
        "train.learning_rate_schedule depends",
        "versions.torch: 2.0.0 ->",
        "threads: 1 -> 2",
    ):
        assert any(said in note and "no longer bit-exact" in note for note in notes)


@pytest.mark.parametrize(
    ("exposure", "said"),
    [
        ({"kind": "annealing"}, "exposure.kind: annealing depends"),
        ({"kind": "custom", "factory": "mine:make"}, "exposure.factory may depend"),
    ],
)
def test_an_exposure_that_plans_the_whole_run_says_so_when_it_grows(
    tmp_path: Path, exposure: dict[str, Any], said: str
):
    config = changed(exposure=exposure)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"num_updates": 80})})
    notes = begin(tmp_path / "run", config).begin_session(longer, command=[], updates_done=50, threads=1)
    assert f"{said} on train.num_updates; no longer bit-exact" in notes
    notes = begin(tmp_path / "same", config).begin_session(config, command=[], updates_done=50, threads=1)
    assert not any(said in note for note in notes)


@pytest.mark.parametrize("order", ["recorded", "shuffled"])
def test_a_shuffled_replay_does_not_grow_as_its_order_is_that_of_the_whole_run(tmp_path: Path, order: str):
    config = changed(exposure={"kind": "replay", "replay_run": "elsewhere", "replay_order": order})
    longer = config.model_copy(update={"train": config.train.model_copy(update={"num_updates": 80})})
    run = begin(tmp_path / "run", config)
    assert run.check_config(config) == []
    if order == "recorded":
        assert run.check_config(longer) == ["train.num_updates: 50 -> 80"]
        return
    with pytest.raises(RunError, match=r"train.num_updates: 50 -> 80 \(exposure.replay_order: shuffled permutes"):
        run.check_config(longer)


def test_the_batch_of_a_skipped_update_is_kept_with_its_non_finite_numbers_spelled_out(run: RunFolder):
    path = run.dump_skipped(12, {"loss": math.nan, "rollouts": ({"ids": (1, 2), "logprobs": [-math.inf]},)})
    assert path == run.path / "skipped" / "update-000012.json"
    assert json.loads(path.read_text()) == {"loss": "nan", "rollouts": [{"ids": [1, 2], "logprobs": ["-inf"]}]}
