"""The arithmetic of PPO: pure functions that a reader can check by hand.

R counts completions, T tokens. Completions end together in the last column, so what comes before a row's own tokens is
padding: False in `mask_RT`, and nothing that stands there reaches any result.
"""

from __future__ import annotations

import torch
from torch import Tensor

KL_GAIN = 0.5
"""How strongly the adaptive weight answers. Ziegler et al. take 0.1, for runs of many thousands of steps."""


def token_rewards(score_R: Tensor, logp_RT: Tensor, ref_logp_RT: Tensor, mask_RT: Tensor, beta: float) -> Tensor:
    """What each token earns: minus beta times its log-ratio to the reference, and on the last one the score as well.

    The last token is the one that the policy itself drew last, the end of the answer where it ended; a score placed
    behind it would belong to no decision of the policy.

    Args:
        score_R: One score per completion.
        logp_RT: Log-probabilities under the policy that sampled, natural.
        ref_logp_RT: The same under the reference.

    Returns:
        Shape (R, T), 0 on padding.

    Source: Ziegler et al. (2019), "Fine-Tuning Language Models from Human Preferences", eq. 2, token by token as in
    Stiennon et al. (2020).
    """
    rewards_RT = torch.where(mask_RT, -beta * (logp_RT - ref_logp_RT), 0.0)
    rewards_RT[:, -1] += score_R
    return rewards_RT


def gae(rewards_RT: Tensor, values_RT: Tensor, mask_RT: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Advantages of the tokens that were drawn; the value behind the last one is 0, since nothing follows it.

    Args:
        rewards_RT: What each token earned.
        values_RT: What the critic expected before each token was drawn.
        gamma: Discount a token.
        gae_lambda: 0 trusts the critic after one token, 1 only what was earned.

    Returns:
        Shape (R, T), 0 on padding. Advantage plus value is the return that the critic learns.

    Source: Schulman et al. (2016), "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    eq. 16.
    """
    advantages_RT = torch.zeros_like(values_RT)
    advantage_R = torch.zeros_like(values_RT[:, 0])
    next_value_R = torch.zeros_like(values_RT[:, 0])
    for t in reversed(range(values_RT.shape[1])):
        surprise_R = rewards_RT[:, t] + gamma * next_value_R - values_RT[:, t]
        advantage_R = surprise_R + gamma * gae_lambda * advantage_R
        advantages_RT[:, t] = advantage_R
        next_value_R = values_RT[:, t]
    return torch.where(mask_RT, advantages_RT, 0.0)


def whitened(x_RT: Tensor, mask_RT: Tensor) -> Tensor:
    """Shift and scale to mean 0 and deviation 1 over the tokens that count; all 0 where they are all the same."""
    x_N = x_RT[mask_RT]
    deviation = x_N.std(correction=0)
    # What rounding leaves of a mean would be whitened into labels.
    differ = deviation > 1e-6 * x_N.abs().max()
    return torch.where(mask_RT & differ, (x_RT - x_N.mean()) / (deviation + 1e-8), 0.0)


def policy_loss(
    logp_RT: Tensor, old_logp_RT: Tensor, advantages_RT: Tensor, clip: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of every token, to be minimised, and where the clip took its gradient away.

    Args:
        logp_RT: Log-probabilities under the policy as it is.
        old_logp_RT: The same under the policy that sampled, however long ago that was.
        clip: How far the ratio of probabilities may fall below 1 before it stops counting.
        clip_high: The same for rising.

    Source: Schulman et al. (2017), "Proximal Policy Optimization Algorithms", eq. 7.
    """
    ratio_RT = (logp_RT - old_logp_RT).exp()
    clipped_RT = ratio_RT.clamp(1 - clip, 1 + clip_high)
    free_RT, held_RT = ratio_RT * advantages_RT, clipped_RT * advantages_RT
    return -torch.minimum(free_RT, held_RT), held_RT < free_RT


def value_loss(
    values_RT: Tensor, old_values_RT: Tensor, returns_RT: Tensor, value_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of every token, and where the clip took its gradient away.

    Args:
        values_RT: What the critic expects now.
        old_values_RT: What it expected before the first update of this step.
        returns_RT: What it should have expected.
        value_clip: How far it may move from `old_values_RT`, in units of reward; None for no limit.

    Source: the reference implementation of PPO in OpenAI's baselines; the paper has no clip on values.
    """
    error_RT = (values_RT - returns_RT).square() / 2
    if value_clip is None:
        return error_RT, torch.zeros_like(error_RT, dtype=torch.bool)
    near_RT = old_values_RT + (values_RT - old_values_RT).clamp(-value_clip, value_clip)
    held_RT = (near_RT - returns_RT).square() / 2
    return torch.maximum(error_RT, held_RT), held_RT > error_RT


def entropy(logits_RTV: Tensor) -> Tensor:
    """Entropy of the distribution that each token is drawn from, in nats, shape (R, T)."""
    logp_RTV = logits_RTV.log_softmax(-1)
    return -(logp_RTV.exp() * logp_RTV).sum(-1)


def token_kl(logp_RT: Tensor, ref_logp_RT: Tensor) -> Tensor:
    """KL from the reference of every token that was drawn, in nats, by an estimate that is never negative.

    Source: the k3 estimator of Schulman (2020), "Approximating KL Divergence".
    """
    gap_RT = ref_logp_RT - logp_RT
    return gap_RT.exp() - gap_RT - 1


def explained(values_RT: Tensor, returns_RT: Tensor, mask_RT: Tensor) -> float | None:
    """Share of the variance of the returns that the critic foresaw: 1 all of it, 0 no more than their mean would.

    None where all returns are the same.
    """
    returns_N, errors_N = returns_RT[mask_RT], (returns_RT - values_RT)[mask_RT]
    variance = float(returns_N.var(correction=0))
    return 1 - float(errors_N.var(correction=0)) / variance if variance > 0 else None


def adapted(weight: float, kl_nats: float, target_nats: float) -> float:
    """The next weight of the KL: larger where the KL is above its target, smaller where it is below.

    An error counts up to a fifth of the target, so that one step changes the weight by a tenth at most.

    Source: the proportional controller of Ziegler et al. (2019), section 2.2, with `KL_GAIN` for their gain.
    """
    error = min(0.2, max(-0.2, kl_nats / target_nats - 1))
    return weight * (1 + KL_GAIN * error)
