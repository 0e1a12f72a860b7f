"""Ranks that do not see one run folder are told so, by host and folder, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from socket import gethostname

import pytest

from atesd import session
from atesd.runs import leave_token, sees_token
from test_ranks import start_ranks

PROGRAM = """
import json
import sys
from pathlib import Path
from unittest import mock

from atesd import session
from atesd.config import load_config
from atesd.errors import RunError
from atesd.models.ranks import process_group

session.TOKEN_PATIENCE = 0.1
said = []
with mock.patch.object(session, "build", side_effect=LookupError("it went on")), process_group("cpu"):
    for out in sys.argv[1:]:
        try:
            session.train(load_config("micro"), Path(out))
        except (RunError, LookupError) as error:
            said.append(str(error))
print(json.dumps(said))
"""


def test_a_rank_with_another_folder_is_named_with_its_host_before_anything_is_loaded(tmp_path: Path) -> None:
    outs = ["run", str(tmp_path / "runs/new")]  # the first is relative: each rank has its own
    ranks = start_ranks(["-c", PROGRAM, *outs], [tmp_path / "cwd-0", tmp_path / "cwd-1"])
    told = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    (refused, passed), others = (json.loads(out) for out, _ in told)
    assert others == [refused, passed]
    host = gethostname()
    assert refused.startswith(
        f"rank 1 on {host} ({tmp_path}/cwd-1/run) does not see the run folder that rank 0 on {host} writes "
        f"({tmp_path}/cwd-0/run): a file made there did not appear within 0.1 seconds. Give --out as an absolute path"
    )
    assert passed == "it went on"
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"cwd-0", "cwd-1"}


def test_a_token_stands_where_the_folder_will_be_made(tmp_path: Path) -> None:
    token = leave_token(tmp_path / "runs" / "deep" / "new")
    assert Path(token).parent == tmp_path
    assert sees_token(token, 0.0)
    assert not sees_token(f"{token}-other", 0.0)


def test_one_process_writes_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "leave_token", None)
    session._require_one_folder(session.Ranks(), tmp_path / "run")
