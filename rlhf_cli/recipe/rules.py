"""Rules between sections; they look at what was written, so that another mistake elsewhere does not hide them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_cli.recipe.keys import KeyPath


def broken_rules(data: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Yield (the key to change, why) for every rule that the plain recipe `data` breaks."""

    def section(name: str) -> dict[str, Any]:
        found = data.get(name)
        return found if isinstance(found, dict) else {}

    def absent(name: str) -> bool:
        return data.get(name) is None

    if not absent("run_online"):
        if absent("data"):
            yield ("run_online",), "needs a `data` section: the prompts that the policy answers"
        feedback = section("run_online").get("feedback", "votes")
        if feedback == "votes" and absent("flow"):
            yield (
                ("run_online", "feedback"),
                "votes come from people: add a `flow` section, or use reward_model feedback",
            )
        if feedback == "reward_model" and absent("train_rm"):
            yield ("run_online", "feedback"), "reward_model feedback needs a `train_rm` section to make the model"
    if not absent("eval"):
        judge = section("eval").get("judge")
        flow = section("flow")
        if judge == "crowd" and flow.get("crowd") is None and flow.get("service") not in ("embedded", "replay"):
            yield ("eval", "judge"), "the crowd judges only where `flow` is embedded and has a `crowd`"
        if judge == "reward_model" and absent("train_rm"):
            yield ("eval", "judge"), "a reward_model judge needs a `train_rm` section to make the model"
        if judge == "flow" and absent("flow"):
            yield ("eval", "judge"), "raters judge through the flow: add a `flow` section"
        if isinstance(data.get("data"), dict) and section("data").get("heldout_prompts") is None:
            yield ("eval",), "needs data.heldout_prompts: prompts that were not trained on"
        if absent("run_online"):
            yield ("eval",), "needs a `run_online` section: without it there is no trained policy to measure"
    if section("model").get("from_scratch") is not None and absent("sft"):
        yield ("model", "from_scratch"), "needs an `sft` section: the tiny model learns its words from that data"
