"""prime-rl's on-policy self-distillation with a bandit: a module that its orchestrator imports.

With examples/prime_rl.patch, in rl.toml:   [orchestrator.env_vars]  PRIME_RL_PLUGINS = "prime_rl_exposure"
(this folder on PYTHONPATH). Without the patch, start the orchestrator alone by this file in place of `orchestrator`:
python examples/prime_rl_exposure.py @ orchestrator.toml
"""

from atesd.bridges.prime_rl import expose

settings = {"exposure": {"kind": "bandit"}, "credit": {"progress_signal": "train_success"}}
expose(settings, out="runs/prime/run", updates=200)  # max_steps of the orchestrator

if __name__ == "__main__":
    from prime_rl.orchestrator.orchestrator import main

    main()
