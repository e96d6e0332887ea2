"""`--simulate`: the same recipe with simulated raters in place of whoever compares, and no money in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlhf_cli.recipe.problems import Place
from rlhf_cli.recipe.written import Written

RANK = 2000
"""After everything that was typed."""


def simulated(tree: Written, taste: str | None) -> Written:
    """The recipe `tree` as it is rehearsed.

    People, the reward model, a function and a judge give way to the raters of an embedded service; with `hybrid` the
    people do. `ppo` climbs scores, which no raters give, so there the reward model stays. Prices are left out.

    Args:
        taste: Of the raters; where None, that of the recipe's own crowd, or the default.
    """
    place = Place(RANK, 0, 0, "--simulate")

    def written(value: Any) -> Written:
        plain = {key: written(item) for key, item in value.items()} if isinstance(value, dict) else value
        return Written(plain, place, tree.folder)

    sections = dict(tree.value) if isinstance(tree.value, dict) else {}

    def change(name: str, leave_out: tuple[str, ...] = (), **values: Any) -> None:
        section = sections.get(name, written({}))
        if isinstance(section.value, dict):
            kept = {key: item for key, item in section.value.items() if key not in leave_out}
            new = {key: written(value) for key, value in values.items()}
            sections[name] = replace(section, value={**kept, **new}, empty=False)

    def plain(*path: str) -> Any:
        found: Any = sections
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
            found = found.value if isinstance(found, Written) else found
        return found

    if not sections.keys() & {"flow", "run_online", "eval"}:
        return tree
    crowd = plain("flow", "crowd")
    crowd = {key: item.plain() for key, item in crowd.items()} if isinstance(crowd, dict) else {}
    change(
        "flow",
        ("recording", "token_env", "client_id_env", "client_secret_env"),
        service="embedded",
        instruction=plain("flow", "instruction") or "Which answer is better?",
        crowd={**crowd, **({"taste": taste} if taste else {})},
    )
    if plain("run_online", "feedback") in ("reward_model", "function", "judge"):
        scores = plain("run_online", "learner", "algorithm") == "ppo"
        change("run_online", ("function",), feedback="reward_model" if scores else "votes")
        length = plain("run_online", "length")
        if isinstance(length, dict) and not scores:  # taken from scores, never from votes
            change("run_online", length={k: item.plain() for k, item in length.items() if k != "penalty"})
    if "run_online" in sections:
        change("run_online", ("judge",))
    if plain("eval", "judge") in ("reward_model", "judge", "flow"):
        change("eval", judge="crowd")
    if "budget" in sections:
        change("budget", ("usd", "usd_per_1k_votes"))
    return replace(tree, value=sections)
