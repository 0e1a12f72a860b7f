"""tinker-cookbook's SDFT with a bandit; needs a key for Tinker's service.

python examples/tinker_sdft.py PROBLEMS.jsonl  (columns problem, solution)
"""

import asyncio
import json
import sys
from pathlib import Path

from tinker_cookbook import renderers
from tinker_cookbook.distillation import sdft
from tinker_cookbook.recipes.sdft.datasets import SDFTDataset
from tinker_cookbook.tokenizer_utils import get_tokenizer

from atesd.bridges.tinker import expose

MODEL = "Qwen/Qwen3-8B"
rows = [json.loads(line) for line in Path(sys.argv[1]).read_text("utf-8").splitlines()]
renderer = renderers.get_renderer("qwen3", tokenizer=get_tokenizer(MODEL))
problems, solutions = [row["problem"] for row in rows], [row["solution"] for row in rows]
dataset = SDFTDataset(problems, solutions, batch_size=64, group_size=1, renderer=renderer)
cfg = sdft.Config(
    model_name=MODEL, recipe_name="sdft", renderer_name="qwen3", reverse=True, log_path="runs/tinker/log", max_steps=100
)
settings = {"exposure": {"kind": "bandit"}, "credit": {"progress_signal": "train_kl"}}
exposed = expose(dataset, cfg, settings, out="runs/tinker/run")
with exposed.listening():
    asyncio.run(sdft.main(cfg, exposed))
