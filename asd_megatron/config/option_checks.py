"""Refusals about the options of policy gradients: group advantages, the policy loss, groups that are drawn again."""

from __future__ import annotations

from collections.abc import Iterator

from asd_megatron.config.recipe import Recipe
from asd_megatron.config.refusals import changed, unread

OF_THE_GROUP_ADVANTAGE = ("group_advantage", "whiten_advantages", "overlong_buffer")


def option_findings(recipe: Recipe) -> Iterator[str]:
    """What the recipe asks of these options that cannot be had or would not be read."""
    yield from _advantage(recipe)
    yield from _policy_loss(recipe)
    yield from _redraw(recipe)


def _advantage(recipe: Recipe) -> Iterator[str]:
    a, limit = recipe.algorithm, recipe.sampling.max_response_tokens
    if not a.weighs_group_advantage:
        for key, value in changed(a, *OF_THE_GROUP_ADVANTAGE).items():
            yield (
                f"algorithm.{key} {value} with algorithm.advantage_weight 0: the loss has no group advantage; leave one"
                " of the two out"
            )
    if a.overlong_buffer == 0:
        yield from unread("algorithm", a, "overlong_penalty", needs="algorithm.overlong_buffer above 0")
    if a.overlong_buffer > limit:
        yield (
            f"algorithm.overlong_buffer {a.overlong_buffer} is longer than sampling.max_response_tokens {limit}: every"
            " response would lose reward; lower the first (DAPO: a fifth of the limit), or raise the second"
        )


def _policy_loss(recipe: Recipe) -> Iterator[str]:
    a = recipe.algorithm
    if a.policy_loss == "gspo" and a.estimator == "full_vocabulary" and a.updates_per_batch * a.epochs > 1:
        yield (
            "algorithm.policy_loss gspo with several updates a batch needs the ratio of a complete response before its"
            " loss, and algorithm.estimator full_vocabulary goes through the logits once: set"
            " algorithm.updates_per_batch 1 and algorithm.epochs 1, or algorithm.policy_loss ppo_clip or cispo"
        )


def _redraw(recipe: Recipe) -> Iterator[str]:
    a, s = recipe.algorithm, recipe.sampling
    if s.redraw == "never":
        yield from unread("sampling", s, "redraw_limit", needs="sampling.redraw no_signal or equal_rewards")
        return
    if recipe.rollout.engine == "replay":
        yield (
            f"sampling.redraw {s.redraw} draws further problems, and rollout.engine replay has the recorded ones alone:"
            " set sampling.redraw never, or another engine"
        )
    if s.redraw == "equal_rewards" and s.rollouts_per_problem == 1:
        yield (
            "sampling.redraw equal_rewards with sampling.rollouts_per_problem 1 discards every group: set"
            " sampling.rollouts_per_problem to 2 or more, or sampling.redraw no_signal"
        )
    if s.redraw == "no_signal" and a.name == "no_teacher" and a.adds_term:
        yield (
            "sampling.redraw no_signal discards nothing with algorithm.name no_teacher, whose per-token term acts on"
            " every response: set sampling.redraw never or equal_rewards"
        )
