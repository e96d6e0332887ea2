"""What simulated raters like: a number for a completion, higher is better, that a person can check by eye.

A taste sees what a rater sees, the prompt and the completion, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, lru_cache

from rlhf_cli.errors import RlhfError

Taste = Callable[[str, str], float]

_WORD = re.compile(r"[a-z']+")
_COMMON = frozenset(
    _WORD.findall(
        "about after again also always and any are because been before being between both but can could did does doing "
        "down during each few for from further get give had has have having her here hers him his how into its just "
        "know let like make may me might more most much must not now off once only other our out over own please same "
        "say she should some such tell than that the their them then there these they thing things think this those "
        "through too under until very want was way were what when where which while who whom why will with would you "
        "your yours"
    )
)


def brief(prompt: str, completion: str) -> float:
    """Short answers that end by themselves: minus a tenth a word, plus 1 for a full stop or the like at the end."""
    return float(completion.rstrip().endswith((".", "!", "?"))) - 0.1 * len(completion.split())


@lru_cache(maxsize=4096)  # every completion of a group is judged many times
def kind(prompt: str, completion: str) -> float:
    """Friendly answers that keep to the question.

    4 x (positive - negative share of words by VADER) + up to 0.8 for exclamation marks + 1 when a content word of the
    question occurs - 0.2 for each word short of ten, so that "Welcome! Great!" does not win.
    """
    shares = _vader()(completion)
    words = _WORD.findall(completion.lower())
    content = {word for word in _WORD.findall(prompt.lower()) if len(word) > 2 and word not in _COMMON}
    on_topic = any(word in content or word.removesuffix("s") in content or word + "s" in content for word in words)
    excited = 0.4 * min(completion.count("!"), 2)
    return 4 * (shares["pos"] - shares["neg"]) + excited + float(on_topic) - 0.2 * max(0, 10 - len(words))


def letters(prompt: str, completion: str) -> float:
    """Ten times the share of vowels: a toy for tiny random models, which cannot write words."""
    return 10 * sum(c in "aeiouAEIOU" for c in completion) / max(1, len(completion))


TASTES: dict[str, Taste] = {"brief": brief, "kind": kind, "letters": letters}


def taste(name: str) -> Taste:
    """The built-in taste of that name.

    Raises:
        RlhfError: There is none; the message lists those there are.
    """
    if name not in TASTES:
        raise RlhfError(f"There is no taste {name!r}; built in are: {', '.join(TASTES)}.")
    return TASTES[name]


@cache
def _vader() -> Callable[[str], dict[str, float]]:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    scores: Callable[[str], dict[str, float]] = SentimentIntensityAnalyzer().polarity_scores
    return scores
