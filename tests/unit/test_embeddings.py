"""Which prompts are alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drift_world import PROMPTS, TOPICS, topic
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.errors import DataError
from rlhf_cli.policy.embeddings import Clusters, Prompts, conversation, k_means
from rlhf_cli.types import Message, Prompt


def ask(text: str, *, system: str | None = None) -> Prompt:
    said = (Message("user", text),) if system is None else (Message("system", system), Message("user", text))
    return Prompt(text, said)


def test_prompts_of_a_topic_are_in_one_cluster_and_other_topics_in_others() -> None:
    clusters = Clusters(PROMPTS, len(TOPICS), Prompts(PROMPTS, "words"), seed=3)
    members = {name: {clusters(prompt) for prompt in PROMPTS if topic(prompt) == name} for name in TOPICS}
    assert all(len(found) == 1 for found in members.values())
    assert set.union(*members.values()) == set(range(len(TOPICS)))
    assert clusters.sizes == [20] * 4
    assert {topic(prompt) for prompt in clusters.middles} == set(TOPICS)


def test_the_same_prompts_and_seed_make_the_same_clusters() -> None:
    first, again = (Clusters(PROMPTS, 6, Prompts(PROMPTS, "words"), seed=3) for _ in range(2))
    assert np.array_equal(first.centres, again.centres)
    assert [first(prompt) for prompt in PROMPTS] == [again(prompt) for prompt in PROMPTS]


def test_there_are_no_more_clusters_than_different_prompts() -> None:
    few = [ask("one river"), ask("one river"), ask("two breads")]
    clusters = Clusters(few, 8, Prompts(few, "words"), seed=0)
    assert sorted(clusters.sizes) == [1, 2]


def test_a_word_that_all_prompts_have_says_nothing() -> None:
    embed = Prompts([ask("please river"), ask("please bread"), ask("please star")], "words")
    assert embed(ask("please river")) @ embed(ask("river")) == pytest.approx(1.0)
    assert not embed(ask("please")).any()
    assert not embed(ask("?!")).any()


def test_what_a_system_prompt_says_to_all_does_not_make_prompts_alike() -> None:
    assert conversation(ask("river", system="Be kind and brief.")) == "river"


def test_every_prompt_is_of_length_one() -> None:
    rows = Prompts(PROMPTS, "words").all(PROMPTS)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(len(PROMPTS)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_k_means_leaves_no_cluster_empty_and_every_centre_in_the_middle_of_its_rows(
    count: int, seed: int, number: int
) -> None:
    rows = np.random.default_rng(seed).normal(size=(number, 3)).round(1)
    centres = k_means(rows, count, np.random.default_rng(seed))
    nearest = ((rows[:, None] - centres) ** 2).sum(2).argmin(1)
    assert 1 <= len(centres) <= count
    assert set(nearest) == set(range(len(centres)))
    for c, centre in enumerate(centres):
        assert centre == pytest.approx(rows[nearest == c].mean(0), abs=1e-6)


def test_a_run_that_compares_by_the_encoder_says_so_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    assert Prompts(PROMPTS).embedding == "words"
    with pytest.raises(DataError, match="rlhf models pull minilm"):
        Prompts(PROMPTS, "minilm")
