"""Filters of lists: `name[contains]=x&created_at[gte]=...&logic=or` becomes a condition of SQL."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from rlhf_cli.server.problems import Problem

_FIELD = re.compile(r"([a-z_]+)\[([a-z_]+)\]")
_TESTS = {
    "eq": "{} = ?",
    "neq": "{} <> ?",
    "gt": "{} > ?",
    "gte": "{} >= ?",
    "lt": "{} < ?",
    "lte": "{} <= ?",
    "contains": "instr({}, ?) > 0",
    "not_contains": "instr({}, ?) = 0",
    "starts_with": "instr({}, ?) = 1",
    "ends_with": "substr({0}, -length(?1)) = ?1",
}


class Filter(NamedTuple):
    """A condition, its columns written by us and its values handed over beside it."""

    sql: str
    values: tuple[object, ...]


EVERYTHING = Filter("1", ())


def read_filter(params: Iterable[tuple[str, str]], fields: Mapping[str, Callable[[str], object]]) -> Filter:
    """The condition in a query string.

    Args:
        fields: What may be filtered by, and how its values are read.

    Raises:
        Problem: 400 for an unknown field, operator or value.
    """
    conditions: list[str] = []
    values: list[object] = []
    lists: dict[str, list[object]] = {}
    joined = " AND "
    for name, text in params:
        if name == "logic":
            if text not in ("and", "or"):
                raise Problem(400, "logic is 'and' or 'or'", {"logic": ["and or or"]})
            joined = f" {text.upper()} "
        found = _FIELD.fullmatch(name)
        if found is None:
            continue
        field, operator = found.groups()
        if field not in fields or operator not in (*_TESTS, "in"):
            raise Problem(400, f"cannot filter by {name}; known are {', '.join(fields)}", {name: ["unknown filter"]})
        try:
            value = fields[field](text)
        except ValueError as error:
            raise Problem(400, f"{name}: {error}", {name: [str(error)]}) from None
        if operator == "in":
            lists.setdefault(field, []).append(value)
        else:
            conditions.append(_TESTS[operator].format(field).replace("?1", "?"))
            values += [value] * conditions[-1].count("?")
    for field, allowed in lists.items():
        conditions.append(f"{field} IN ({', '.join('?' * len(allowed))})")
        values += allowed
    return Filter(f"({joined.join(conditions)})", tuple(values)) if conditions else EVERYTHING
