"""The keys of `run_online`: how groups are sampled, who compares them, how the policy learns, what holds it back."""

from __future__ import annotations

from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rlhf_cli.recipe.kinds import DataFile, EnvironmentName, Section, Share, in_order, problem


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def _check_address(url: str) -> None:
    try:
        fine = bool(urlsplit(url).hostname) and urlsplit(url).port != 0
    except ValueError:  # a port that is none
        fine = False
    if not fine:
        raise problem("is no address such as https://api.example.org/v1", "url")


def _not_in_the_open(url: str) -> None:
    """Raise where a secret would be sent without encryption."""
    if url.startswith("http:") and not _is_loopback(url):
        raise problem("a secret would be readable on its way; use https", "url")


class Role(Section):
    """One way to sample some of the completions of a group."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)
    """Shown beside its figures, such as `main` and `enhancer`."""
    count: int = Field(ge=1, le=16)
    """Completions of a group that it samples; the counts of all roles add up to `group_size`."""
    temperature: float = Field(1.0, gt=0, le=10)
    """Of this role."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Of this role."""
    policy: Literal["current", "previous"] = "current"
    """`previous` samples from the newest checkpoint (until there is one, the model that training started from) instead
    of the policy as it is; at least one role is `current`."""
    best_of: int = Field(1, ge=1, le=64)
    """Sample so many for each completion and keep the one that the reward model of `train_rm` likes best."""


class Sampling(Section):
    """How the policy samples a group."""

    temperature: float | list[float] = 1.0
    """One temperature, or several that the completions of a group take in turn."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this much probability."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest completion in tokens."""
    roles: list[Role] | None = None
    """Different ways to sample the completions of one group, instead of `temperature` and `top_p`."""

    def of_group(self, group_size: int) -> list[Role]:
        """How each completion of a group is sampled, in order; a role without a name where the recipe has none."""
        if self.roles is not None:
            return [role for role in self.roles for _ in range(role.count)]
        several = self.temperature if isinstance(self.temperature, list) else [self.temperature]
        spread = [several[i * len(several) // group_size] for i in range(group_size)]
        return [Role.model_construct(name="", count=1, temperature=t, top_p=self.top_p) for t in spread]

    @property
    def own(self) -> frozenset[str]:
        """Names of the roles that show how the policy is: those that sample it as it is and keep all, where there are.

        Else those that sample it as it is; the empty name where the recipe has no roles.
        """
        current = [role for role in self.roles or [] if role.policy == "current"]
        unchosen = [role for role in current if role.best_of == 1]
        return frozenset(role.name for role in unchosen or current) or frozenset({""})

    @property
    def plain(self) -> Sampling:
        """How the policy alone is measured: without roles; where there are any, as the first of `own`."""
        if self.roles is None:
            return self
        role = next(role for role in self.roles if role.name in self.own)
        return self.model_copy(update={"roles": None, "temperature": role.temperature, "top_p": role.top_p})

    @model_validator(mode="after")
    def _check(self) -> Self:
        temperatures = self.temperature if isinstance(self.temperature, list) else [self.temperature]
        if not temperatures or not all(0 < t <= 10 for t in temperatures):
            raise problem(
                f"expected a number above 0 and at most 10, or a list of them, got {self.temperature}", "temperature"
            )
        return self


Algorithm = Literal["dpo", "grpo", "rloo", "ppo"]

_OF_DPO = ("pairs", "labels", "label_smoothing")
_OF_GRADIENTS = ("clip", "clip_high", "ratio", "scale")
_OF_PPO = (
    "kl_target_nats",
    "gamma",
    "gae_lambda",
    "value_coefficient",
    "value_clip",
    "value_learning_rate",
    "entropy",
    "unended_reward",
)
_ONLY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_OF_DPO, ("dpo",)),
    **dict.fromkeys(_OF_GRADIENTS, ("grpo", "rloo", "ppo")),
    "ratio": ("grpo", "rloo"),
    "scale": ("grpo",),
    **dict.fromkeys(_OF_PPO, ("ppo",)),
}
_LOSSES: dict[str, tuple[str, ...]] = {
    "dpo": ("sigmoid", "ipo"),
    "grpo": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo"),
    "rloo": ("grpo", "dr_grpo", "dapo", "bnpo", "cispo"),
    "ppo": (),
}


class Learner(Section):
    """How the policy learns. Keys that its algorithm does not have are refused."""

    algorithm: Algorithm
    """`dpo` fits the votes themselves, with beta times the log-ratio to the reference as the score; `grpo` and `rloo`
    raise what scored above its group; `ppo` climbs the rewards of a reward model with a critic."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference; larger holds tighter. With `dpo` the scale of its scores, with
    the others the weight of the KL a token."""
    learning_rate: float = Field(5e-6, gt=0, lt=1)
    """Constant learning rate."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients longer than this are shortened to it."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    reference: Literal["sft", "previous"] = "sft"
    """What the policy is held to: the model it started from, or, renewed every `reference_every` steps, itself as it
    was then."""
    reference_every: int | None = Field(None, ge=1)
    """Steps between two renewals of the `previous` reference: the length of an iteration."""
    epochs: int = Field(1, ge=1, le=16)
    """Passes over the groups of a step."""
    minibatches: int = Field(1, ge=1)
    """Updates in each pass, each on its part of the groups."""
    accumulate: int = Field(1, ge=1)
    """Parts that an update is computed in: the same gradient, in less memory."""
    loss: Literal["sigmoid", "ipo", "grpo", "dr_grpo", "dapo", "bnpo", "cispo"] | None = None
    """`dpo`: `sigmoid` (the Bradley-Terry likelihood, its default) or `ipo`; `grpo` and `rloo`: how TRL averages over
    tokens, `grpo` (the default), `dr_grpo`, `dapo`, `bnpo` or `cispo`."""
    pairs: Literal["all", "best_worst"] = "all"
    """`all` learns from every vote of a group; `best_worst` only from its best against its worst completion."""
    labels: Literal["votes", "posterior"] = "votes"
    """`votes` counts them; `posterior` takes for every pair the probability that the ranking fitted to all votes of the
    group gives it."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of every vote that counts for the other side."""
    clip: float = Field(0.2, gt=0, lt=1)
    """How far the probability of a token may fall, as a share, before it stops counting."""
    clip_high: float | None = Field(None, gt=0)
    """The same for rising; `clip` when left out."""
    ratio: Literal["token", "sequence"] = "token"
    """Whether probabilities are compared with those of sampling token by token, or as one mean over a completion."""
    scale: Literal["none", "group"] = "none"
    """`group` divides scores by their deviation in the group: noisy where votes are few."""
    kl_target_nats: float | None = Field(None, gt=0)
    """Adapts beta until the KL a completion is this; fixed beta when left out."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount a token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Between one-step (0) and whole-completion (1) estimates of the advantage."""
    value_coefficient: float = Field(0.5, gt=0)
    """Weight of the critic's loss."""
    value_clip: float | None = Field(0.2, gt=0)
    """How far the critic may move within a step, in units of reward, before that stops counting; `null`: no limit."""
    value_learning_rate: float | None = Field(None, gt=0, lt=1)
    """Of the critic; `learning_rate` when left out."""
    entropy: float = Field(0.0, ge=0)
    """Weight of the bonus for entropy."""
    unended_reward: float | None = None
    """Reward of a completion that the token limit cut off, in place of the model's; its own when left out."""

    @property
    def loss_name(self) -> str:
        """The loss as written, or the default of the algorithm; empty for `ppo`, which has one."""
        return self.loss or next(iter(_LOSSES[self.algorithm]), "")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, algorithms in _ONLY.items():
            changed = getattr(self, key) != type(self).model_fields[key].default
            if changed and self.algorithm not in algorithms:
                raise problem(f"{key} is a key of {', '.join(algorithms)}; {self.algorithm} has none", key)
        if self.loss is not None and self.loss not in _LOSSES[self.algorithm]:
            known = ", ".join(_LOSSES[self.algorithm]) or "no choice of losses"
            raise problem(f"{self.algorithm} has {known}, not {self.loss}", "loss", "algorithm")
        if self.ratio == "sequence" and self.loss_name != "grpo":
            raise problem(f"{self.loss_name} weighs tokens, so a ratio of whole completions needs loss grpo", "ratio")
        if (self.reference == "previous") != (self.reference_every is not None):
            raise problem("the previous reference and reference_every belong together", "reference_every", "reference")
        return self


class Function(Section):
    """Your own scores: a Python function, or an HTTP endpoint that takes and gives the same as JSON."""

    file: DataFile | None = None
    """A Python file; its directory is put on the import path."""
    name: str = Field("score", min_length=1)
    """The function in it, `def` or `async def`: takes a list of `{"prompt", "completions"}` and returns for each a list
    of numbers, one for each completion, None where there is no label."""
    url: str | None = Field(None, pattern=r"^https?://[^@\s]+$")
    """Instead of a file: gets `{"groups": [{"prompt", "completions"}]}` and answers `{"scores": [[...]]}`."""
    token_env: EnvironmentName | None = None
    """Name of the environment variable that holds the endpoint's bearer token."""
    batch: int = Field(8, ge=1)
    """Most groups in one call."""
    timeout_s: float = Field(120.0, gt=0)
    """How long one call may take, in seconds."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.file is None) == (self.url is None):
            raise problem("name either a file or a url", "file", "url")
        if self.file is not None and self.token_env is not None:
            raise problem("a token is for a url, and this is a file", "token_env")
        if self.url is not None:
            _check_address(self.url)
        if self.url is not None and self.token_env is not None:
            _not_in_the_open(self.url)
        return self


class Judge(Section):
    """A language model behind an OpenAI-compatible endpoint that compares two completions, in both orders."""

    url: str = Field(pattern=r"^https?://[^@\s]+$")
    """Base address, such as `https://api.example.org/v1`."""
    model: str = Field(min_length=1)
    """Name of the model there."""
    key_env: EnvironmentName | None = None
    """Name of the environment variable that holds the key; without one the endpoint is asked without a key, which only
    loopback addresses may."""
    prompt: str = Field(
        "Question:\n{prompt}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}\n\nWhich answer is better? Say only A or B.",
        min_length=1,
    )
    """What it is asked, with `{prompt}`, `{a}` and `{b}` in it; the last line of its answer has to be A, B or tie."""
    comparisons: int | None = Field(None, ge=1)
    """Pairs compared of each group, each in both orders; all of them when left out."""
    at_once: int = Field(8, ge=1, le=256)
    """Most requests in flight."""
    timeout_s: float = Field(60.0, gt=0)
    """How long one request may take, in seconds."""
    usd_per_1m_tokens: float = Field(0.0, ge=0)
    """Price, of tokens in and out alike; counted against `budget.usd` in `run_online`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        missing = [name for name in ("{prompt}", "{a}", "{b}") if name not in self.prompt]
        if missing:
            raise problem(f"the prompt has no {' and no '.join(missing)} in it", "prompt")
        _check_address(self.url)
        if self.key_env is None and not _is_loopback(self.url):
            raise problem("missing key 'key_env': only a judge at a loopback address is asked without a key", "url")
        if self.key_env is not None:
            _not_in_the_open(self.url)
        return self


class Selection(Section):
    """Which groups people see, where not all of them. The others get the reward model's word with `hybrid` feedback,
    and are set aside unasked with `votes`."""

    by: Literal["uncertainty", "diverse", "drifting"] = "uncertainty"
    """`uncertainty`: where the reward model is least sure which completion is best, or its `ensemble` most divided;
    `diverse`: prompts unlike those that people saw; `drifting`: where model and people have begun to disagree, by
    cluster of `drift`."""
    share: Share = 0.25
    """Part of the groups that people see."""
    random_share: float = Field(0.2, ge=0, le=1)
    """Part of those that is drawn at random, so that figures about all groups stay unbiased."""


class Refresh(Section):
    """Refit the reward model on people's votes while the policy trains."""

    every_groups: int = Field(16, ge=2)
    """Groups that people decided between two refits; at least one of them is held out."""
    heldout_share: Share = 0.2
    """Part of the fresh groups that is kept to decide whether a refit is published."""


class Drift(Section):
    """Watch, by cluster of prompts, whether model and people begin to disagree, and ask people about those clusters."""

    clusters: int = Field(8, ge=1, le=256)
    """Clusters of prompts."""
    window: int = Field(64, ge=8)
    """How many of the groups that people decided most lately may count as new; they are compared with those before."""
    z: float = Field(3.5, gt=0)
    """Standard errors by which disagreement has to have risen."""
    round_groups: int = Field(16, ge=1)
    """Groups of a drifting cluster that people are asked about in a targeted round."""


class Length(Section):
    """What is done about completions that get longer because length is liked."""

    penalty: float = Field(0.0, ge=0)
    """Taken from a model's, function's or ranking's score for every character, never from people's votes."""
    max_correlation: float | None = Field(None, gt=0, le=1)
    """Trips where the correlation of score and length within groups is beyond this."""
    max_growth: float | None = Field(None, gt=1)
    """Trips where completions are so many times as long as those of the first step."""
    on_trip: Literal["note", "stop", "rollback"] = "note"
    """`note` says so, `stop` ends the run with exit code 7, `rollback` does as the KL guard does."""


class Segments(Section):
    """Raters may mark what is good or bad inside a completion; marked tokens weigh more in the DPO loss."""

    weight: float = Field(5.0, gt=1)
    """Of a marked token against an unmarked one."""


class Staleness(Section):
    """How old a vote may be."""

    max_steps: int = Field(8, ge=0)
    """A group sampled more learner steps ago than this is set aside."""


class Kl(Section):
    """Limits on how far the policy drifts from the model it started from, in nats a completion."""

    soft_nats: float | None = Field(None, gt=0)
    """Beyond this, beta is raised until the policy comes back."""
    hard_nats: float | None = Field(None, gt=0)
    """Beyond this, the run ends as `on_hard` says."""
    on_hard: Literal["stop", "rollback"] = "stop"
    """`stop` ends the run with exit code 7 and keeps the last good checkpoint; `rollback` goes on from there with a
    higher beta."""
    rollback_beta: float = Field(2.0, gt=1)
    """What beta is multiplied by at each roll-back."""
    max_rollbacks: int = Field(3, ge=1)
    """One more than this stops the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        in_order(self, "soft_nats", "hard_nats")
        return self


class RunOnline(Section):
    """The loop: sample groups, ask for votes, learn from those that are there, while the next are being made."""

    steps: int = Field(ge=1)
    """Learner steps in all."""
    prompts_per_step: int = Field(8, ge=1)
    """Groups sampled and trained on a step."""
    group_size: int = Field(8, ge=2, le=16)
    """Completions of a prompt."""
    max_in_flight: int = Field(48, ge=1)
    """Groups out for votes at the same time."""
    min_ready: int | None = Field(None, ge=1)
    """A step starts when so many groups are ranked; `prompts_per_step` when left out."""
    feedback: Literal["votes", "reward_model", "hybrid", "function", "judge"] = "votes"
    """Who compares completions: people through the flow, the reward model of `train_rm`, both (`hybrid`: the model at
    once, people where it is worth their time), a `function` of yours, or a language model as `judge`."""
    incomplete: Literal["use", "drop", "resubmit_once"] = "use"
    """A group with fewer than `responses.min` votes: learn from those it has, drop it, or ask once more and use all."""
    cut_off: Literal["use", "drop"] = "use"
    """A group whose completions were all cut off by the token limit: compare them all the same, or set it aside before
    anybody is asked. Groups whose completions are all empty or all the same always are."""
    sampling: Sampling = Field(default_factory=Sampling)
    """How a group is sampled."""
    learner: Learner = Field(default_factory=lambda: Learner(algorithm="dpo"))
    """How the policy learns from votes."""
    staleness: Staleness = Field(default_factory=Staleness)
    """How old a vote may be."""
    kl: Kl = Field(default_factory=Kl)
    """How far the policy may drift."""
    function: Function | None = None
    """Needed with `feedback: function`."""
    judge: Judge | None = None
    """Needed with `feedback: judge`, and with `judge: judge` in `eval`."""
    selection: Selection | None = None
    """Which groups people see; when left out, all of them with `votes`, and the defaults of this section with
    `hybrid`."""
    refresh: Refresh | None = None
    """Keep the reward model up with the policy; only with `hybrid`."""
    drift: Drift | None = None
    """Ask people where the reward model goes wrong; only with `hybrid` and `refresh`."""
    length: Length | None = None
    """What is done about ever longer completions."""
    segments: Segments | None = None
    """Let raters mark spans; only with `votes` and `dpo`, and not with `flow.service: rapidata`."""
    checkpoint_every: int = Field(5, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept, the newest ones."""

    @property
    def asks_people(self) -> bool:
        return self.feedback in ("votes", "hybrid")

    @property
    def samples_previous(self) -> bool:
        """Whether a role samples from the newest checkpoint."""
        return any(role.policy == "previous" for role in self.sampling.roles or [])

    @property
    def reads_reward_model(self) -> bool:
        """Whether anything in the loop follows from the model of `train_rm`."""
        return (
            self.feedback in ("reward_model", "hybrid")
            or self.learner.algorithm == "ppo"  # its critic starts as that
            or (self.selection is not None and self.selection.by == "uncertainty")
            or any(role.best_of > 1 for role in self.sampling.roles or [])
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        in_order(self, "prompts_per_step", "max_in_flight")
        in_order(self, "min_ready", "max_in_flight")
        rolls_back = self.kl.on_hard == "rollback" or (self.length is not None and self.length.on_trip == "rollback")
        if rolls_back and self.keep_checkpoints < 2:
            raise problem("a roll-back needs the checkpoint before the latest: keep at least 2", "keep_checkpoints")
        if isinstance(self.sampling.temperature, list) and len(self.sampling.temperature) > self.group_size:
            raise problem(
                f"sampling.temperature has {len(self.sampling.temperature)} entries for a group_size of "
                f"{self.group_size}",
                "sampling",
                "group_size",
            )
        if (self.feedback == "function") != (self.function is not None):
            raise problem("function feedback and the section `function` belong together", "feedback")
        if self.feedback == "judge" and self.judge is None:
            raise problem("judge feedback needs the section `judge`: which model compares, and where", "feedback")
        return self
