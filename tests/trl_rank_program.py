"""What each of two ranks runs for test_bridge_trl.py: python trl_rank_program.py MODEL FOLDER, as torchrun would."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

from atesd.bridges.trl import expose  # noqa: E402
from test_bridge_trl import CREDIT, UPDATES, Witness, sdft, sdpo  # noqa: E402

SETTINGS: dict[str, Any] = {
    "exposure": {"kind": "learned", "policy": {"decisions_per_policy_update": 2}},
    "credit": {"progress_signal": "probe_success", "hold_updates": 1, "lookahead_updates": 1},
    "data": {"checker": "exact"},
}
BANDIT = {"exposure": {"kind": "bandit"}, "credit": {**CREDIT, "progress_signal": "train_success"}}


def main(model: Path, folder: Path) -> None:
    """Train SDFT to the end, resume it from its middle, train SDPO; write what this rank's exposures have become."""
    rank, found = int(os.environ["RANK"]), dict[str, Any]()
    shape = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_find_unused_parameters": False}
    saving = {"save_strategy": "steps", "save_steps": 3}
    for name, make in {"sdft": sdft, "sdpo": sdpo}.items():
        witness = Witness()
        trainer = make(model, folder / name / "trainer", witness, **shape, **saving)
        settings, measure = (SETTINGS, probe_of(rank)) if name == "sdft" else (BANDIT, {})
        exposed = expose(trainer, settings, folder / name / "run", measure)
        trainer.train()
        assert exposed.handle is not None
        found[name] = exposed.handle.exposure.state_dict()
        found[f"{name} rows"] = len(witness.batches[0]["teacher_input_ids"])
    again = sdft(model, folder / "sdft/trainer", Witness(), **shape, **saving)
    exposed = expose(again, SETTINGS, folder / "sdft/run", probe_of(rank))
    again.train(resume_from_checkpoint=str(folder / "sdft/trainer/checkpoint-3"))
    assert exposed.handle is not None
    found["resumed"] = exposed.handle.exposure.state_dict()
    found["updates"] = [UPDATES, again.state.global_step]
    (folder / f"rank-{rank}.json").write_text(json.dumps(found, default=lambda tensor: tensor.tolist()), "utf-8")


def probe_of(rank: int) -> dict[Any, Any]:
    """A probe by which each rank measures something else."""
    return {"probe_success": lambda: float(rank)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
