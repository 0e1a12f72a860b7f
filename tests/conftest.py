"""Shapes written in the maths and scoring modules are checked while the tests run; one thread per test process."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch  # noqa: F401 (before what is read without it: its annotations are then checked too)
from jaxtyping import install_import_hook

pytest.register_assert_rewrite("engine_contract", "weights_contract")

install_import_hook(["atesd.maths", "atesd.models.score"], "beartype.beartype")
