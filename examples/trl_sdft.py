"""TRL's SDFTTrainer with a learned exposure.

python examples/trl_sdft.py MODEL PROBLEMS.jsonl  (columns problem, solution)
"""

import sys

from datasets import load_dataset
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

from atesd.bridges.trl import expose

model, problems = sys.argv[1:]


def as_trl(row):
    return {"prompt": [{"role": "user", "content": row["problem"]}], "privileged_context": row["solution"]}


rows = load_dataset("json", data_files=problems, split="train")
trainer = SDFTTrainer(
    model=model,
    args=SDFTConfig(
        output_dir="runs/trl/trainer",
        max_prompt_length=None,  # else TRL cuts the problem off in front
        num_generations=2,
        max_steps=100,
        save_steps=25,
    ),
    train_dataset=rows.map(as_trl, remove_columns=rows.column_names),
)
settings = {
    "exposure": {"kind": "learned"},
    "credit": {"progress_signal": "train_success"},
    "data": {"source": problems},  # read by `atesd audit runs/trl/run/config.yaml`
}
expose(trainer, settings, out="runs/trl/run")
trainer.train()
