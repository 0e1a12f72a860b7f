"""Shapes written in the maths and scoring modules are checked while the tests run."""

from jaxtyping import install_import_hook

install_import_hook(["atesd.maths", "atesd.models.score"], "beartype.beartype")
