"""ms-swift's on-policy distillation with a bandit.

swift rlhf --rlhf_type gkd --external_plugins examples/swift_exposure.py --callbacks atesd --logging_steps 1 \
    --model MODEL --teacher_model MODEL --lmbda 1 --dataset PROBLEMS.jsonl  (columns messages, teacher_prompt)
"""

from atesd.bridges.swift import expose

settings = {"exposure": {"kind": "bandit"}, "credit": {"progress_signal": "train_kl"}}
expose(settings, out="runs/swift", template="{prompt}\n\nReference solution:\n{reference}\n\nNow solve it yourself.")
