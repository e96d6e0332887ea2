"""Kinds of recipe values that pydantic has no word for: durations, services, and values that are not there yet."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)")
_SERVICES = ("embedded", "rapidata", "replay")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values never change, and a docstring below a key documents it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


def problem(text: str, *keys: str) -> PydanticCustomError:
    """A mistake in words that are shown as they are; `keys` are the keys of the section which it is about."""
    return PydanticCustomError("problem", "{text}", {"text": text, "keys": keys})


@dataclass(frozen=True, slots=True)
class NotYet:
    """Marks values which the recipe language knows and no stage honours yet; to write one is a mistake that says so."""

    refused: Callable[[Any], bool]
    """Whether a value is one of those."""
    what: str
    """What is missing, with `{value}` for the value as written."""
    use: str
    """What to write instead."""

    def check(self, value: Any) -> Any:
        if self.refused(value):
            what = self.what.format(value=f"`{value}`")
            raise problem(f"{what} not there yet in this version; use {self.use}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))


def in_order(section: BaseModel, *keys: str) -> None:
    """Raise where a value is larger than the next one; None fits anywhere."""
    for first, second in pairwise(keys):
        low, high = getattr(section, first), getattr(section, second)
        if low is not None and high is not None and low > high:
            raise problem(f"{first} ({low}) is more than {second} ({high})", first, second)


def one_of(*values: str) -> Callable[[Any], bool]:
    """For `NotYet`: the value is one of these."""
    return lambda value: value in values


def more_than_one(value: int) -> bool:
    """For `NotYet`: a count that needs more than there is."""
    return value > 1


def _seconds(value: object) -> object:
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise problem(f"expected a duration such as 90s, 30m or 2h, got {value!r}")
        return float(match[1]) * _SECONDS[match[2]]
    return value


def _service(value: str) -> str:
    if value in _SERVICES:
        return value
    url = urlsplit(value)
    if url.scheme not in ("http", "https") or not url.hostname:
        near = difflib.get_close_matches(value, _SERVICES, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise problem(f"expected embedded, rapidata, replay or an address such as https://flow.example.org{hint}")
    if url.username or url.password:
        raise problem("an address here holds no user name or password; name an environment variable in `token_env`")
    if url.query or url.fragment:
        raise problem("an address here ends before any ? or #")
    return value.rstrip("/")


Duration = Annotated[
    float,
    BeforeValidator(_seconds),
    Field(gt=0),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}]}),
]
"""Seconds; written as a number or as `90s`, `30m`, `2h`."""

Service = Annotated[str, AfterValidator(_service)]
"""`embedded`, `rapidata`, `replay`, or the address of a flow server."""

DataFile = Annotated[Path, Field(strict=False)]
"""A file that has to exist; relative to the recipe that names it."""

SUFFIXES = (".jsonl", ".csv", ".parquet")
"""Of the files that rows are read from."""


def _local_or_hub(value: object) -> object:
    if not isinstance(value, str | Path) or not value:
        shown = "a list" if isinstance(value, list) else "keys and values" if isinstance(value, dict) else repr(value)
        raise PydanticCustomError("source_type", "expected a file or a hub id, got {shown}", {"shown": shown})
    return Path(value) if os.path.isabs(value) else value


Source = Annotated[Annotated[Path, Field(strict=True)] | str, BeforeValidator(_local_or_hub)]
"""Where rows come from: a file of one of `SUFFIXES`, relative to the recipe, or a hub id `org/name[:split]`, a str."""

Share = Annotated[float, Field(gt=0, lt=1)]
"""A part of a whole."""

EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)]
"""The name of an environment variable that holds a secret, never the secret itself."""
