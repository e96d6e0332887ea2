"""Which groups people see in a run, and the watch that says where they should look, as the recipe says."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_cli.feedback.drift import DriftWatch
from rlhf_cli.feedback.selection import Chooser
from rlhf_cli.journal.events import PromptsCompared
from rlhf_cli.journal.replay import RunState
from rlhf_cli.policy.embeddings import Clusters, Prompts
from rlhf_cli.recipe.data import read_prompts
from rlhf_cli.recipe.online import Selection
from rlhf_cli.stages.session import Session
from rlhf_cli.types import Feedback


def chooser_of(session: Session, state: RunState) -> tuple[Chooser, DriftWatch | None]:
    """Who decides about groups, and the drift watch that it listens to where the recipe has one.

    How prompts are compared is journalled once and stays so, whatever was pulled in between. Neither knows anything of
    an earlier process yet: see their `resume`.
    """
    recipe, online = session.recipe, session.recipe.run_online
    assert online is not None
    assert recipe.data is not None
    selection, drift = online.selection or Selection(), online.drift
    if selection.by != "diverse" and drift is None:
        return Chooser(selection, recipe.seed), None
    prompts = read_prompts(recipe.data.prompts)
    session.progress("comparing prompts", 0, 1)
    embed = Prompts(prompts, state.compared.embedding if state.compared else None)
    clusters = Clusters(prompts, drift.clusters, embed, recipe.seed) if drift is not None else None
    session.progress("comparing prompts", 1, 1)
    if state.compared is None:
        found = tuple(zip(clusters.sizes, (p.id for p in clusters.middles), strict=True)) if clusters else ()
        session.journal.append(PromptsCompared(embedding=embed.embedding, clusters=found))
    watch = DriftWatch(drift, clusters, session.note) if drift is not None and clusters is not None else None
    return Chooser(selection, recipe.seed, embed=embed, watch=watch), watch


def affords(session: Session, people: Feedback) -> Callable[[int], bool]:
    """Whether the budget allows so many groups with people, beside the votes that they gave."""
    return lambda groups: session.recipe.affords(people.status().get("flow/votes_total", 0.0), groups)
