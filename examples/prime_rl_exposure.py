"""prime-rl's on-policy self-distillation with a bandit: a module that its orchestrator imports.

With the two lines of docs/bridges.md in prime-rl, and this folder on PYTHONPATH, in rl.toml:

    [orchestrator.env_vars]
    PRIME_RL_PLUGINS = "prime_rl_exposure"

Without them, start the orchestrator alone by this file:

    python examples/prime_rl_exposure.py @ orchestrator.toml   (in place of: orchestrator @ orchestrator.toml)
"""

from atesd.bridges.prime_rl import expose

settings = {"exposure": {"kind": "bandit"}, "credit": {"progress_signal": "train_success"}}
expose(settings, out="runs/prime", updates=200)  # max_steps of the orchestrator

if __name__ == "__main__":
    from prime_rl.orchestrator.orchestrator import main

    main()
