"""TRL's SDPOTrainer with a bandit.

python examples/trl_sdpo.py MODEL PROBLEMS.jsonl  (columns problem, answer)
"""

import sys

from datasets import load_dataset
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from atesd.bridges.trl import expose

model, problems = sys.argv[1:]


def right(completions, answer, **_):
    return [float(str(gold) in one[0]["content"]) for one, gold in zip(completions, answer, strict=True)]


rows = load_dataset("json", data_files=problems, split="train")
trainer = SDPOTrainer(
    model=model,
    reward_funcs=right,
    args=SDPOConfig(output_dir="runs/sdpo/trainer", max_prompt_length=None, num_generations=4, max_steps=100),
    train_dataset=rows.map(lambda row: {"prompt": [{"role": "user", "content": row["problem"]}]}),
)
# The exposure acts on the successful rollout that SDPO's teacher reads: that is the reference here.
settings = {"exposure": {"kind": "bandit"}, "credit": {"progress_signal": "train_success"}}
expose(trainer, settings, out="runs/sdpo/run")
trainer.train()
