"""Rules between sections; they look at what was written, so that another mistake elsewhere does not hide them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf_cli.recipe.keys import KeyPath, field_at

Broken = Iterator[tuple[KeyPath, str]]


class Plain:
    """The recipe as plain values, with the defaults of what is left out. Numbers that are no numbers read as None."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def value(self, *path: str) -> Any:
        """The value at `path`, or the default of that key where the value or a section above it is left out."""
        found: Any = self.data
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        if found is None and (field := field_at(path)) is not None and field.default_factory is None:
            return None if field.is_required() else field.default
        return found

    def section(self, *path: str) -> dict[str, Any]:
        found = self.value(*path)
        return found if isinstance(found, dict) else {}

    def has(self, *path: str) -> bool:
        """Whether the section or key at `path` is there at all, whatever is in it."""
        return self.value(*path) is not None

    def number(self, *path: str) -> float | None:
        """The number at `path`; None where there is none, or one that is a mistake of its own."""
        found, field = self.value(*path), field_at(path)
        if not isinstance(found, int | float) or isinstance(found, bool):
            return None
        limits = field.metadata if field is not None else []
        within = all(getattr(limit, "ge", found) <= found <= getattr(limit, "le", found) for limit in limits)
        return found if within else None

    def whole(self, *path: str) -> int | None:
        found = self.number(*path)
        return found if isinstance(found, int) else None


def broken_rules(data: dict[str, Any]) -> Broken:
    """Yield (the key to change, why) for every rule that the plain recipe `data` breaks."""
    recipe = Plain(data)
    if recipe.has("run_online"):
        yield from _who_compares(recipe)
        yield from _what_people_see(recipe)
        yield from _sampling(recipe)
        yield from _amounts(recipe)
        yield from _learner(recipe)
        yield from _guards(recipe)
    if recipe.has("eval"):
        yield from _eval(recipe)
    yield from _prices(recipe)
    if recipe.has("model", "from_scratch") and not recipe.has("sft"):
        yield ("model", "from_scratch"), "needs an `sft` section: the tiny model learns its words from that data"


def _who_compares(recipe: Plain) -> Broken:
    if not recipe.has("data"):
        yield ("run_online",), "needs a `data` section: the prompts that the policy answers"
    key, feedback = ("run_online", "feedback"), recipe.value("run_online", "feedback")
    if feedback == "votes" and not recipe.has("flow"):
        yield key, "votes come from people: add a `flow` section, or use reward_model feedback"
    if feedback == "reward_model" and not recipe.has("train_rm"):
        yield key, "reward_model feedback needs a `train_rm` section to make the model"
    if recipe.has("run_online", "judge") and "judge" not in (feedback, recipe.value("eval", "judge")):
        yield ("run_online", "judge"), "nobody asks it: neither run_online.feedback nor eval.judge is `judge`"
    if feedback not in ("votes", "hybrid") and recipe.value("run_online", "incomplete") != "use":
        yield ("run_online", "incomplete"), f"is about people who gave few votes; {feedback} feedback asks none"
    if feedback == "hybrid":
        if not recipe.has("flow"):
            yield key, "hybrid feedback asks people too: add a `flow` section, or use reward_model feedback"
        if not recipe.has("train_rm"):
            yield key, "hybrid feedback needs a `train_rm` section to make the model; people alone are votes feedback"
        if recipe.value("train_rm", "kind") == "pairwise":
            yield key, "hybrid feedback needs rewards, which a pairwise model has none of; use kind bradley_terry"
        if recipe.value("flow", "service") == "replay":
            yield key, "replay gives votes to the groups they were given to; hybrid would choose others; use votes"


def _what_people_see(recipe: Plain) -> Broken:
    feedback, online = recipe.value("run_online", "feedback"), ("run_online",)
    if recipe.has("run_online", "selection"):
        key, by = (*online, "selection"), recipe.value("run_online", "selection", "by")
        if feedback not in ("votes", "hybrid"):
            yield key, f"chooses what people see, and {feedback} feedback asks none; use votes or hybrid feedback"
        elif by == "uncertainty" and not recipe.has("train_rm"):
            yield (*key, "by"), "uncertainty is a reward model's: add a `train_rm` section, or choose `by: diverse`"
        elif by == "drifting" and feedback != "hybrid":
            yield (*key, "by"), "drifting groups are those where model and people disagree: use hybrid feedback"
        elif by == "drifting" and not recipe.has("run_online", "drift"):
            yield (*key, "by"), "add run_online.drift, which says how prompts are clustered and disagreement is watched"
    for name, what in (("refresh", "refits the model that answers for people"), ("drift", "compares model and people")):
        if recipe.has("run_online", name) and feedback != "hybrid":
            yield (*online, name), f"{what}: use hybrid feedback, not {feedback}"
    if recipe.has("run_online", "drift") and feedback == "hybrid" and not recipe.has("run_online", "refresh"):
        yield (*online, "drift"), "asks people so that the reward model is refitted: add run_online.refresh"
    if recipe.has("run_online", "segments"):
        algorithm = _algorithm(recipe)
        if feedback != "votes":
            yield (*online, "segments"), f"marks are made by people who vote: use votes feedback, not {feedback}"
        if algorithm != "dpo":
            yield (*online, "segments"), f"marks are weights in the loss of dpo; {algorithm} has no place for them"
        if recipe.value("flow", "service") == "rapidata":
            yield (*online, "segments"), "rapidata's raters cannot mark anything; leave it out, or use a server of ours"


def _algorithm(recipe: Plain) -> Any:
    return recipe.value("run_online", "learner", "algorithm") or "dpo"  # what a recipe without a learner gets


def _sampling(recipe: Plain) -> Broken:
    sampling = ("run_online", "sampling")
    roles = recipe.value(*sampling, "roles")
    roles = roles if isinstance(roles, list) else []
    if not recipe.has(*sampling, "roles"):
        return
    for name in ("temperature", "top_p"):
        if recipe.value(*sampling, name) not in (1, [1]):
            yield (*sampling, name), "every role has its own: write it there, or leave `roles` out"
    read = [Plain({"run_online": {"sampling": {"roles": role}}}) for role in roles]

    def each(key: str) -> list[Any]:
        return [role.value(*sampling, "roles", key) for role in read]

    names, counts = each("name"), [role.whole(*sampling, "roles", "count") for role in read]
    size = recipe.whole("run_online", "group_size")
    if size is not None and None not in counts and sum(filter(None, counts)) != size:
        yield (
            (*sampling, "roles"),
            f"{' + '.join(map(str, counts)) or 'an empty list'} completions are not run_online.group_size ({size})",
        )
    for n, name in enumerate(names):
        if isinstance(name, str) and name in names[:n]:
            yield (*sampling, "roles", str(n), "name"), f"a second role named {name!r}: their figures would be mixed"
    if roles and all(policy == "previous" for policy in each("policy")):
        yield (*sampling, "roles"), "all are `policy: previous`: nothing would be sampled from the policy that learns"
    for n, (policy, best_of) in enumerate(zip(each("policy"), each("best_of"), strict=True)):
        role = (*sampling, "roles", str(n))
        if isinstance(best_of, int) and best_of > 1 and not recipe.has("train_rm"):
            yield (*role, "best_of"), "a reward model chooses the best: add a `train_rm` section"
        every, steps = recipe.whole("run_online", "checkpoint_every"), recipe.whole("run_online", "steps")
        if policy == "previous" and every is not None and steps is not None and every >= steps:
            yield (
                (*role, "policy"),
                f"no checkpoint is made before the last step: checkpoint_every ({every}) is not below steps ({steps})",
            )


def _amounts(recipe: Plain) -> Broken:
    """Numbers that do not go together, and so would only be found out after something was paid."""
    size, feedback = recipe.whole("run_online", "group_size"), recipe.value("run_online", "feedback")
    if feedback in ("votes", "hybrid") and recipe.has("flow"):
        most = recipe.whole("flow", "responses", "max")
        again = recipe.whole("flow", "responses", "min") if _asks_again(recipe) else 1
        if most is not None and again is not None:
            yield from _budget(recipe, most + again - 1)
    if feedback == "judge" and size is not None:
        pairs = recipe.whole("run_online", "judge", "comparisons")
        if pairs is not None and not size - 1 <= pairs <= size * (size - 1) // 2:
            yield (
                ("run_online", "judge", "comparisons"),
                f"{pairs} pairs of a group of {size}: it takes {size - 1} to compare all, and there are "
                f"{size * (size - 1) // 2}",
            )
    groups = recipe.whole("run_online", "prompts_per_step")
    minibatches = recipe.whole("run_online", "learner", "minibatches")
    accumulate = recipe.whole("run_online", "learner", "accumulate")
    if groups is not None and minibatches is not None and accumulate is not None:
        parts = minibatches * accumulate
        if parts > 0 and groups % parts:
            key = "accumulate" if accumulate > 1 else "minibatches"
            yield (
                ("run_online", "learner", key),
                f"the {groups} groups of run_online.prompts_per_step do not divide into {parts} equal parts "
                "(minibatches x accumulate)",
            )


def _asks_again(recipe: Plain) -> bool:
    return bool(recipe.value("run_online", "incomplete") == "resubmit_once")


def _prices(recipe: Plain) -> Broken:
    usd, judge = ("budget", "usd"), ("run_online", "judge", "usd_per_1m_tokens")
    by_judge = recipe.value("run_online", "feedback") == "judge"
    if recipe.has(*usd) and by_judge and not recipe.value(*judge):
        yield usd, "usd needs run_online.judge.usd_per_1m_tokens: without a price nothing would count against it"
    if recipe.has(*usd) and not by_judge and not recipe.value("budget", "usd_per_1k_votes"):
        yield usd, "usd needs usd_per_1k_votes: without a price nothing would count against it"


def _budget(recipe: Plain, most: int) -> Broken:
    """A budget that does not reach for the `most` votes that one group may take would end the run before it began."""
    votes, usd, price = (recipe.number("budget", key) for key in ("votes", "usd", "usd_per_1k_votes"))
    if votes is not None and votes < most:
        yield ("budget", "votes"), f"one group may take {most} votes; nothing could be asked within {votes:g}"
    if usd is not None and price is not None and usd < most * price / 1000:
        yield (
            ("budget", "usd"),
            f"one group may take {most} votes, {most * price / 1000:g} USD; nothing could be asked within {usd:g}",
        )


def _learner(recipe: Plain) -> Broken:
    online = ("run_online",)
    labels = recipe.value(*online, "learner", "labels")
    penalty = recipe.number(*online, "length", "penalty") or 0
    bare = recipe.value(*online, "feedback") in ("votes", "judge") and _algorithm(recipe) == "dpo"
    if penalty > 0 and bare and labels == "votes":
        yield (
            (*online, "length", "penalty"),
            "is taken from scores, and here votes are learned from as they are; use `labels: posterior`, another "
            "learner, or feedback that gives scores",
        )
    limits = [recipe.value(*online, "kl", key) for key in ("soft_nats", "hard_nats")]
    if recipe.value(*online, "learner", "reference") == "previous" and limits == [None, None]:
        yield (
            (*online, "learner", "reference"),
            "moves with the policy, so nothing would hold it near the model it started from: add kl.soft_nats or "
            "kl.hard_nats, which are measured against that model",
        )
    if _algorithm(recipe) == "ppo":
        yield from _ppo(recipe)


def _ppo(recipe: Plain) -> Broken:
    learner, feedback = ("run_online", "learner"), recipe.value("run_online", "feedback")
    if feedback not in ("reward_model", "function"):
        yield (
            (*learner, "algorithm"),
            f"ppo climbs scores, and {feedback} feedback compares; use reward_model or function feedback, or another "
            "learner",
        )
    if not recipe.has("train_rm") and feedback != "reward_model":
        yield (*learner, "algorithm"), "ppo has a critic that starts as the reward model: add a `train_rm` section"
    if recipe.value("train_rm", "kind") == "pairwise":
        yield (*learner, "algorithm"), "ppo needs rewards, which a pairwise model has none of; use kind bradley_terry"
    if recipe.has(*learner, "kl_target_nats") and recipe.has("run_online", "kl", "soft_nats"):
        yield (*learner, "kl_target_nats"), "adapts beta, and so does kl.soft_nats; leave one of them out"


def _guards(recipe: Plain) -> Broken:
    kl, length = ("run_online", "kl"), ("run_online", "length")
    if recipe.value(*kl, "on_hard") == "rollback" and not recipe.has(*kl, "hard_nats"):
        yield (*kl, "on_hard"), "rolls back at the hard limit: add kl.hard_nats"
    trips = recipe.value(*length, "on_trip")
    limits = [recipe.value(*length, key) for key in ("max_correlation", "max_growth")]
    if trips in ("stop", "rollback") and limits == [None, None]:
        yield (*length, "on_trip"), f"nothing trips that could {trips}: add max_correlation or max_growth"


def _eval(recipe: Plain) -> Broken:
    judge, service = recipe.value("eval", "judge"), recipe.value("flow", "service")
    if judge == "crowd" and not recipe.has("flow", "crowd") and service not in ("embedded", "replay"):
        yield ("eval", "judge"), "the crowd judges only where `flow` is embedded and has a `crowd`"
    if judge == "reward_model" and not recipe.has("train_rm"):
        yield ("eval", "judge"), "a reward_model judge needs a `train_rm` section to make the model"
    if judge == "judge" and not recipe.has("run_online", "judge"):
        yield ("eval", "judge"), "needs a `judge` section in `run_online`: which model compares, and where"
    if judge == "flow" and not recipe.has("flow"):
        yield ("eval", "judge"), "raters judge through the flow: add a `flow` section"
    if recipe.section("data") and not recipe.has("data", "heldout_prompts"):
        yield ("eval",), "needs data.heldout_prompts: prompts that were not trained on"
    if not recipe.has("run_online"):
        yield ("eval",), "needs a `run_online` section: without it there is no trained policy to measure"
