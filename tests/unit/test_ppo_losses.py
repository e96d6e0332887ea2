"""The arithmetic of PPO, by hand, against plain loops in float64, and with padding that must not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_cli.learner.ppo_losses import (
    adapted,
    entropy,
    explained,
    gae,
    policy_loss,
    token_kl,
    token_rewards,
    value_loss,
    whitened,
)


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask_of(lengths: list[int]) -> Tensor:
    longest = max(lengths)
    return torch.tensor([[t >= longest - length for t in range(longest)] for length in lengths])


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask of one to four completions; padding holds numbers that would show at once."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    mask = mask_of(lengths)
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rewards, values = (torch.where(mask, f64(numbers.normal(size=mask.shape).tolist()), 1e6) for _ in range(2))
    return rewards, values, mask


def test_the_score_is_earned_by_the_last_token_and_the_kl_by_every_token() -> None:
    mask = mask_of([3, 1])
    logp, ref_logp = f64([[-1.0, -2.0, -0.5], [9.0, 9.0, -3.0]]), f64([[-1.5, -1.0, -0.5], [7.0, 7.0, -1.0]])
    rewards = token_rewards(f64([2.0, -1.0]), logp, ref_logp, mask, beta=0.1)
    expected = f64([[-0.05, 0.1, 2.0], [0, 0, -1 + 0.2]])
    assert torch.allclose(rewards, expected, atol=1e-15, rtol=0)


def test_advantages_by_hand() -> None:
    """Two tokens, discount 0.9, lambda 0.5: the last surprise is 3 - 2, the first 1 + 0.9 * 2 - 0.5."""
    found = gae(f64([[1.0, 3.0]]), f64([[0.5, 2.0]]), mask_of([2]), 0.9, 0.5)
    assert torch.allclose(found, f64([[2.3 + 0.9 * 0.5 * 1.0, 1.0]]), atol=1e-15, rtol=0)


@given(rows(), st.floats(0.5, 1), st.floats(0, 1))
@settings(deadline=None)
def test_advantages_are_the_weighted_sum_of_all_later_surprises(
    given_rows: tuple[Tensor, Tensor, Tensor], gamma: float, gae_lambda: float
) -> None:
    """Equation 16 of the paper, as a double loop over each row alone, without its padding."""
    rewards, values, mask = given_rows
    found = gae(rewards, values, mask, gamma, gae_lambda)
    assert not found[~mask].any()
    for r in range(len(mask)):
        earned, expected = rewards[r][mask[r]].tolist(), [*values[r][mask[r]].tolist(), 0.0]
        surprises = [earned[t] + gamma * expected[t + 1] - expected[t] for t in range(len(earned))]
        by_hand = [
            sum((gamma * gae_lambda) ** (later - t) * surprises[later] for later in range(t, len(surprises)))
            for t in range(len(surprises))
        ]
        assert found[r][mask[r]].tolist() == pytest.approx(by_hand, abs=1e-9)


@given(rows())
@settings(deadline=None)
def test_with_lambda_one_returns_are_what_was_earned_and_with_zero_what_the_next_value_says(
    given_rows: tuple[Tensor, Tensor, Tensor],
) -> None:
    rewards, values, mask = given_rows
    for r in range(len(mask)):
        row = rewards[r : r + 1, mask[r]], values[r : r + 1, mask[r]], mask[r : r + 1, mask[r]]
        earned = row[0].flip(1).cumsum(1).flip(1)
        assert torch.allclose(gae(*row, 1.0, 1.0) + row[1], earned, atol=1e-9)
        after = torch.cat([row[1][:, 1:], torch.zeros(1, 1, dtype=torch.float64)], dim=1)
        assert torch.allclose(gae(*row, 1.0, 0.0) + row[1], row[0] + after, atol=1e-9)


@given(rows())
@settings(deadline=None)
def test_whitened_advantages_have_mean_zero_and_deviation_one_over_real_tokens_alone(
    given_rows: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, _, mask = given_rows
    white = whitened(x, mask)
    assert not white[~mask].any()
    assert float(white[mask].mean()) == pytest.approx(0, abs=1e-9)
    if mask.sum() > 1:
        assert float(white[mask].std(correction=0)) == pytest.approx(1, abs=1e-4)
    for same in (3.0, 5.3, -1.7):  # nothing to tell apart is no signal, and no NaN, whatever rounding leaves of it
        assert not whitened(torch.full(x.shape, same), mask).any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "held"),
    [
        (1.0, 2.0, -2.0, -2.0, False),
        (1.5, 2.0, -2.6, 0.0, True),  # already 30 % likelier: no more is earned
        (1.5, -2.0, 3.0, 2.0, False),  # likelier though it was bad: the full push back
        (0.5, -2.0, 1.6, 0.0, True),
        (0.5, 2.0, -1.0, -2.0, False),
        (1.25, 2.0, -2.5, -2.0, False),  # rising is let go further than falling
        (0.75, -2.0, 1.6, 0.0, True),
    ],
)
def test_the_surrogate_by_hand(ratio: float, advantage: float, loss: float, slope: float, held: bool) -> None:
    """`slope` is d loss / d ratio; the gradient is taken in log-probabilities, where it is ratio times that."""
    logp, old = f64([[math.log(ratio) - 1.0]]).requires_grad_(), f64([[-1.0]])
    found, is_held = policy_loss(logp, old, f64([[advantage]]), 0.2, 0.3)
    found.sum().backward()
    assert found.item() == pytest.approx(loss)
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(slope * ratio)
    assert is_held.item() is held


def test_at_the_sampling_policy_the_gradient_is_the_policy_gradient() -> None:
    logp = f64([[-1.0, -2.0], [-0.1, -3.0]]).requires_grad_()
    advantages = f64([[0.5, -1.0], [2.0, 0.0]])
    loss, held = policy_loss(logp, logp.detach(), advantages, 0.2, 0.2)
    loss.sum().backward()
    assert torch.equal(logp.grad, -advantages)  # type: ignore[arg-type]
    assert not held.any()


@pytest.mark.parametrize(
    ("value", "loss", "slope", "held"),
    [
        (1.1, 0.405, -0.9, False),  # inside the limit, half of 0.9 squared
        (1.5, 0.32, 0.0, True),  # 0.2 on the way to the return is enough for one step
        (0.5, 1.125, -1.5, False),  # further away than where it may stop: pulled back in full
        (3.0, 0.5, 1.0, False),
    ],
)
def test_the_clipped_value_loss_by_hand(value: float, loss: float, slope: float, held: bool) -> None:
    """The critic said 1 before, and should have said 2; it may move by 0.2."""
    values = f64([[value]]).requires_grad_()
    found, is_held = value_loss(values, f64([[1.0]]), f64([[2.0]]), 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss)
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(slope)
    assert is_held.item() is held


def test_without_a_limit_the_value_loss_is_half_the_squared_error() -> None:
    values = f64([[1.5, -4.0]]).requires_grad_()
    loss, held = value_loss(values, f64([[1.0, 1.0]]), f64([[2.0, 2.0]]), None)
    loss.sum().backward()
    assert loss.tolist() == [[0.125, 18.0]]
    assert values.grad is not None
    assert values.grad.tolist() == [[-0.5, -6.0]]
    assert not held.any()


def test_entropy_by_hand() -> None:
    even, sure = f64([[[3.0, 3.0, 3.0, 3.0]]]), f64([[[500.0, 0.0, 0.0, 0.0]]])
    assert entropy(even).item() == pytest.approx(math.log(4))
    assert entropy(sure).item() == pytest.approx(0, abs=1e-12)
    three_to_one = f64([[[math.log(3), 0.0]]])
    assert entropy(three_to_one).item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_the_gradient_of_entropy_is_that_of_finite_differences() -> None:
    logits = f64(np.random.default_rng(0).normal(0, 2, (2, 3, 5)).tolist()).requires_grad_()
    assert torch.autograd.gradcheck(entropy, logits)


def test_the_kl_of_tokens_by_hand() -> None:
    found = token_kl(f64([[-1.0, -2.0, -0.5]]), f64([[-1.0, -1.0, -2.5]]))
    assert found.tolist() == [[0, pytest.approx(math.e - 2), pytest.approx(math.exp(-2) + 1)]]


def test_what_the_critic_foresaw_by_hand() -> None:
    mask = mask_of([3, 2])
    returns = f64([[1.0, 2.0, 3.0], [1e6, 4.0, 5.0]])
    assert explained(returns - 7, returns, mask) == pytest.approx(1)  # a constant error is foreseen variance
    assert explained(torch.zeros_like(returns), returns, mask) == pytest.approx(0)
    wrong = -returns
    assert explained(wrong, returns, mask) == pytest.approx(1 - 4)
    assert explained(returns, torch.ones_like(returns), mask) is None


def test_the_weight_of_the_kl_follows_the_kl() -> None:
    assert adapted(0.1, kl_nats=5.0, target_nats=5.0) == 0.1
    assert adapted(0.1, kl_nats=5.5, target_nats=5.0) == pytest.approx(0.105)
    assert adapted(0.1, kl_nats=50.0, target_nats=5.0) == pytest.approx(0.11)  # no more than a tenth at once
    assert adapted(0.1, kl_nats=-1.0, target_nats=5.0) == pytest.approx(0.09)
