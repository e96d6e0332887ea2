"""Which prompts are alike: a unit vector for each, and clusters of them."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.errors import DataError
from rlhf_cli.policy.packaged import model_dir
from rlhf_cli.types import Prompt

Array = NDArray[np.float64]
Embedding = Literal["minilm", "words"]

WORDS_DIM = 512
TEXTS_AT_ONCE = 64
FITTED_ON = 4096
"""Most prompts that clusters are made from; the others are sorted into them."""
STARTS, ROUNDS = 8, 100
"""Of k-means: the best of so many starts, each of at most so many rounds."""

_WORD = re.compile(r"\w+")


class Prompts:
    """Unit vectors of prompts, each computed once.

    Args:
        prompts: Those of the run; how rare a word is among them says how much it counts.
        embedding: `minilm`, the packaged encoder, or `words`, hashed; by default the encoder where it was pulled.

    Raises:
        DataError: The encoder was asked for and is not there.
    """

    def __init__(self, prompts: Sequence[Prompt], embedding: Embedding | None = None) -> None:
        self.embedding: Embedding = embedding or ("minilm" if model_dir("minilm").is_dir() else "words")
        if self.embedding == "minilm" and not model_dir("minilm").is_dir():
            raise DataError("this run compares prompts by minilm, which is not here: rlhf models pull minilm")
        self._known: dict[str, Array] = {}
        self._embed: Callable[[Sequence[str]], Array] = (
            _minilm() if self.embedding == "minilm" else _hashed_words([conversation(p) for p in prompts])
        )

    def __call__(self, prompt: Prompt) -> Array:
        """Shape (D,), length 1; all zeros where there is nothing to compare."""
        return self.all([prompt])[0]

    def all(self, prompts: Sequence[Prompt]) -> Array:
        """Shape (N, D), a row for each prompt."""
        missing = {text: None for p in prompts if (text := conversation(p)) not in self._known}
        if missing:
            self._known.update(zip(missing, self._embed(list(missing)), strict=True))
        return np.stack([self._known[conversation(p)] for p in prompts])


def conversation(prompt: Prompt) -> str:
    """What a prompt is about: everything said in it, less what a system prompt says to all."""
    return "\n".join(message.content for message in prompt.messages if message.role != "system")


def _hashed_words(texts: Iterable[str]) -> Callable[[Sequence[str]], Array]:
    """Counts of words, hashed to `WORDS_DIM` places with a sign; the rarer among `texts`, the more a word counts."""
    number, having = 0, Counter[str]()
    for text in texts:
        number += 1
        having.update(set(_WORD.findall(text.lower())))

    def embed(some: Sequence[str]) -> Array:
        rows = np.zeros((len(some), WORDS_DIM))
        for row, text in zip(rows, some, strict=True):
            for word, count in Counter(_WORD.findall(text.lower())).items():
                place = zlib.crc32(word.encode())
                weight = (1 + math.log(count)) * math.log((1 + number) / (1 + having[word]))
                row[place % WORDS_DIM] += weight if place & 0x80000000 else -weight
        return _unit(rows)

    return embed


def _minilm() -> Callable[[Sequence[str]], Array]:
    """The mean of the encoder's last states over the tokens of a text, as its makers use it."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = str(model_dir("minilm"))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def embed(some: Sequence[str]) -> Array:
        rows = []
        for first in range(0, len(some), TEXTS_AT_ONCE):
            batch = tokenizer(
                list(some[first : first + TEXTS_AT_ONCE]),
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            mask = batch["attention_mask"][:, :, None].float()
            states = model(**batch).last_hidden_state
            rows.append(((states * mask).sum(1) / mask.sum(1)).double().numpy())
        return _unit(np.concatenate(rows))

    return embed


def _unit(rows: Array) -> Array:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1.0))


class Clusters:
    """Prompts sorted by likeness: k-means on their vectors, the same for the same prompts and seed.

    Args:
        prompts: What the clusters are made from; a sample of them where there are very many.
        count: How many; fewer where there are fewer different prompts.
        embed: Their vectors.
    """

    def __init__(self, prompts: Sequence[Prompt], count: int, embed: Prompts, seed: int) -> None:
        generator = np.random.default_rng(seed)
        if len(prompts) > FITTED_ON:
            prompts = [prompts[n] for n in np.sort(generator.choice(len(prompts), FITTED_ON, replace=False))]
        self._embed, rows = embed, embed.all(prompts)
        self.centres = min(
            (k_means(rows, count, generator) for _ in range(STARTS)), key=lambda c: _squares(rows, c).min(1).sum()
        )
        near = rows @ self.centres.T
        nearest = _nearest(rows, self.centres)
        self.sizes = [int((nearest == c).sum()) for c in range(len(self.centres))]
        self.middles = [prompts[int(near[:, c].argmax())] for c in range(len(self.centres))]
        """The prompt that is most like each cluster."""

    def __call__(self, prompt: Prompt) -> int:
        return int(_nearest(self._embed(prompt)[None], self.centres)[0])


def k_means(rows: Array, count: int, generator: np.random.Generator) -> Array:
    """Centres of at most `count` clusters, shape (K, D), every one of them with a row of its own.

    Source: Lloyd (1982), started as in Arthur and Vassilvitskii (2007), "k-means++".
    """
    centres = rows[[int(generator.integers(len(rows)))]]
    while len(centres) < count:
        distances = _squares(rows, centres).min(1)
        if distances.sum() < 1e-9:
            break
        chosen = int(generator.choice(len(rows), p=distances / distances.sum()))
        centres = np.concatenate([centres, rows[[chosen]]])
    for _ in range(ROUNDS):
        nearest = _nearest(rows, centres)
        kept = [c for c in range(len(centres)) if (nearest == c).any()]
        moved = np.stack([rows[nearest == c].mean(0) for c in kept])
        if moved.shape == centres.shape and np.allclose(moved, centres, rtol=0, atol=1e-12):
            break
        centres = moved
    return centres


def _squares(rows: Array, centres: Array) -> Array:
    squares = (rows**2).sum(1)[:, None] - 2 * rows @ centres.T + (centres**2).sum(1)[None, :]
    return np.asarray(np.maximum(squares, 0.0))


def _nearest(rows: Array, centres: Array) -> NDArray[np.intp]:
    return _squares(rows, centres).argmin(1)
