"""A reward model in use: which of two completions is better, and a number for each.

`reward_model.json` beside the weights says what a plain `from_pretrained` cannot know. There are two kinds:
`RewardModel` scores one completion at a time, `PairwiseModel` reads two at once. Both answer `probability`, calibrated.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.errors import DataError
from rlhf_cli.policy.encoding import Encoded, batch_of, encode_answer, encode_comparison, longest
from rlhf_cli.policy.heads import HEADS, headless, load_heads
from rlhf_cli.policy.load import load_tokenizer, locate
from rlhf_cli.types import Message

ABOUT = "reward_model.json"
TOKENS_AT_ONCE = 8192
"""Padding included; longer batches are no faster on a processor and take memory."""

Array = NDArray[np.float64]
Text = tuple[Sequence[Message], Sequence[str]]
"""A prompt and its completions."""


@dataclass(frozen=True, slots=True)
class About:
    """What `reward_model.json` says."""

    kind: Literal["bradley_terry", "pairwise"] = "bradley_terry"
    temperature: float = 1.0
    """Differences of rewards are divided by it before they become probabilities; fitted on held-out votes."""
    max_length: int = 1024
    ensemble: int | None = None
    version: str = ""
    """Says which weights; made from their content."""


def read_about(folder: Path) -> About | None:
    """What is said of the model in `folder`; None where nothing is.

    Raises:
        DataError: It cannot be understood.
    """
    file = folder / ABOUT
    if not file.is_file():
        return None
    try:
        return About(**json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{file} is not understood: {error}; train the reward model again") from error


def write_about(folder: Path, about: About) -> None:
    (folder / ABOUT).write_text(json.dumps(asdict(about), indent=2) + "\n")


def weights_version(folder: Path) -> str:
    """A short name of the weights in `folder`, from their content."""
    whole = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            whole.update(hashlib.file_digest(handle, "sha256").digest())
    return whole.hexdigest()[:12]


def load_reward_model(path: str) -> PreTrainedModel:
    """A scalar head on the backbone found at `path`; a fresh head where there is none yet.

    Raises:
        DataError: Nothing loadable there.
    """
    try:
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            locate(path), num_labels=1, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise DataError(f"no reward model could be made from '{path}': {str(error).splitlines()[0]}") from error
    model.config.get_text_config().use_cache = False  # keys and values are for those who generate
    return model


def open_reward_model(path: str) -> RewardModel | PairwiseModel:
    """The trained reward model at `path`: a folder, a hub id, or a packaged model's name."""
    folder = Path(locate(path))
    about = read_about(folder) or About(version=weights_version(folder) if folder.is_dir() else path)
    model, tokenizer = load_reward_model(path), load_tokenizer(path)
    tokenizer.padding_side = "right"
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if about.kind == "pairwise":
        return PairwiseModel(model, tokenizer, about)
    if (folder / HEADS).is_file():
        load_heads(model, folder)
    return RewardModel(model, tokenizer, about)


class Reader(ABC):
    """What both kinds share: a model that turns encoded texts into numbers."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, about: About) -> None:
        self.model, self.tokenizer, self.about = model.eval(), tokenizer, about
        self.max_length = longest(tokenizer, about.max_length)

    @torch.no_grad()
    def read(self, rows: Sequence[Encoded]) -> Array:
        """One row of numbers per text, one per head; texts of like length go through the model together."""
        order = sorted(range(len(rows)), key=lambda k: len(rows[k].ids))
        found: list[torch.Tensor | None] = [None] * len(rows)
        while order:
            # The longest first, so that the largest batch comes before anything else was paid for.
            count = max(1, TOKENS_AT_ONCE // len(rows[order[-1]].ids))
            some, order = order[-count:], order[:-count]
            batch = batch_of([rows[k] for k in some], int(self.tokenizer.pad_token_id), self.model.device)
            for k, numbers in zip(some, self.model(**batch).logits.double().cpu(), strict=True):
                found[k] = numbers
        return torch.stack([numbers for numbers in found if numbers is not None]).numpy()

    def probabilities(self, texts: Sequence[Text]) -> list[Array]:
        """For each prompt a matrix: the calibrated probability that i is better than j; 1/2 against itself."""
        return [self.calibrated(logits) for logits in self.logits(texts)]

    def calibrated(self, logits: Array) -> Array:
        """Probabilities for what `logits` gave."""
        return 0.5 + 0.5 * np.tanh(0.5 * logits / self.about.temperature)  # logistic, without overflow

    @abstractmethod
    def logits(self, texts: Sequence[Text]) -> list[Array]:
        """For each prompt the log-odds at temperature 1 that i is better than j, antisymmetric."""

    def probability(self, prompt: Sequence[Message], completions: Sequence[str]) -> Array:
        """`probabilities` of one prompt, shape (G, G)."""
        return self.probabilities([(prompt, completions)])[0]


class RewardModel(Reader):
    """Scores completions one at a time; higher is better, the zero point means nothing."""

    def rewards(self, texts: Sequence[Text]) -> list[Array]:
        """For each prompt what every head gives to each completion, shape (G, K)."""
        return self._by_prompt(texts)

    def features(self, texts: Sequence[Text]) -> list[Array]:
        """For each prompt what the heads read of each completion, shape (G, H)."""
        with headless(self.model):
            return self._by_prompt(texts)

    def _by_prompt(self, texts: Sequence[Text]) -> list[Array]:
        rows = [encode_answer(self.tokenizer, p, c, self.max_length) for p, completions in texts for c in completions]
        numbers, done = self.read(rows), []
        for _, completions in texts:
            mine, numbers = numbers[: len(completions)], numbers[len(completions) :]
            done.append(mine)
        return done

    def score_all(self, texts: Sequence[Text]) -> list[tuple[Array, Array | None]]:
        """For each prompt the rewards of its completions, and how far the heads of an ensemble are apart on each.

        The latter is the standard deviation over the heads; None where there is only one.
        """
        return [(r_GK.mean(1), r_GK.std(1, ddof=1) if r_GK.shape[1] > 1 else None) for r_GK in self.rewards(texts)]

    def cuts(self, prompt: Sequence[Message], completions: Sequence[str]) -> int:
        """How many of the completions do not fit, together with their prompt, into `max_length`."""
        return sum(encode_answer(self.tokenizer, prompt, c, self.max_length).cut > 0 for c in completions)

    def score(self, prompt: Sequence[Message], completions: Sequence[str]) -> list[float]:
        """One reward per completion."""
        return [float(x) for x in self.score_all([(prompt, completions)])[0][0]]

    def logits(self, texts: Sequence[Text]) -> list[Array]:
        """For each prompt the differences of rewards, i minus j: log-odds before calibration."""
        return [rewards[:, None] - rewards[None, :] for rewards, _ in self.score_all(texts)]


class PairwiseModel(Reader):
    """Compares two completions of a prompt, in both orders."""

    def one_way(self, texts: Sequence[Text]) -> list[Array]:
        """For each prompt a matrix: log-odds that i is better than j when i is read first; 0 against itself."""
        pairs = [
            (prompt, completions[i], completions[j])
            for prompt, completions in texts
            for i, j in permutations(range(len(completions)), 2)
        ]
        done = [np.zeros((len(completions), len(completions))) for _, completions in texts]
        if pairs:
            numbers = iter(self.read([encode_comparison(self.tokenizer, *pair, self.max_length) for pair in pairs]))
            for logits in done:
                for i, j in permutations(range(len(logits)), 2):
                    logits[i, j] = next(numbers)[0]
        return done

    def cuts(self, prompt: Sequence[Message], completions: Sequence[str]) -> int:
        """How many of the completions are in a comparison that does not fit into `max_length`."""
        cut = [
            (i, j)
            for i, j in combinations(range(len(completions)), 2)
            if encode_comparison(self.tokenizer, prompt, completions[i], completions[j], self.max_length).cut
        ]
        return len({k for pair in cut for k in pair})

    def logits(self, texts: Sequence[Text]) -> list[Array]:
        """For each prompt the log-odds that i is better than j, averaged over both orders of reading."""
        return [(logits - logits.T) / 2 for logits in self.one_way(texts)]

    def score(self, prompt: Sequence[Message], completions: Sequence[str]) -> list[float]:
        """How much each completion is preferred to the others here: its mean log-odds against them.

        The model has no scale of its own, so these numbers mean nothing beside another prompt's or another call's.

        Raises:
            DataError: Only one completion, which there is nothing to compare with.
        """
        if len(completions) < 2:
            raise DataError("a pairwise model compares completions; one alone has no score")
        return [float(x) for x in self.logits([(prompt, completions)])[0].sum(1) / (len(completions) - 1)]


def order_consistency(one_way: Sequence[Array]) -> float | None:
    """Share of pairs on which both orders of reading agree who is better; None without a pair."""
    agree = [
        (logits[i, j] > 0) == (logits[j, i] < 0)
        for logits in one_way
        for i in range(len(logits))
        for j in range(i + 1, len(logits))
    ]
    return float(np.mean(agree)) if agree else None
