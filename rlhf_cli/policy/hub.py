"""Datasets of the hub, as rows."""

from __future__ import annotations

from collections.abc import Iterable

import datasets

from rlhf_cli.errors import DataError
from rlhf_cli.recipe.rows import Row


def hub_rows(source: str) -> Iterable[Row]:
    """Rows of `org/name`, or of a split of it, `org/name:split`; the split is `train` unless it is named.

    Raises:
        DataError: Not there, or the hub cannot be asked.
    """
    name, _, split = source.partition(":")
    try:
        loaded: Iterable[Row] = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"the dataset {source} could not be loaded from the hub: {reason}\nAre name and split right, is the hub "
            "reachable (HF_HUB_OFFLINE)? A local .jsonl, .csv or .parquet file needs no hub."
        ) from error
    return loaded
