"""What cannot work in the section `reward`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from asd_megatron.config.code_reward import CodeSection
from asd_megatron.config.refusals import changed
from asd_megatron.config.reward import HttpSection, RewardSection, VerifierSection
from asd_megatron.distributed.addresses import is_loopback

if TYPE_CHECKING:
    from asd_megatron.config.recipe import AnyRecipe

UP_TO_ONE = ("math", "exact", "puzzle", "reasoning_gym")  # their rewards lie between 0 and 1


def reward_findings(recipe: AnyRecipe) -> Iterator[str]:
    """What cannot work, one finding a yield, each with its remedy."""
    reward = recipe.reward
    if reward is None:
        return
    for i, verifier in enumerate(reward.verifiers):
        yield from _verifier(verifier, f"reward.parts[{i}]" if reward.parts else "reward")
    if reward.parts:
        yield from _parts(reward)
        threshold = getattr(getattr(recipe, "privileged", None), "success_threshold", 1.0)
        most = sum(max(part.weight, 0.0) for part in reward.parts)
        if most < threshold and all(part.name in UP_TO_ONE for part in reward.parts):
            yield (
                f"reward.parts: the weights allow a reward of {most:g} at most, below the {threshold:g} from which a"
                " response counts as a success: raise the weights, or lower privileged.success_threshold"
            )


def _parts(reward: RewardSection) -> Iterator[str]:
    for key in changed(reward, *VerifierSection.model_fields):
        yield (
            f"reward.{key} is that of one verifier, and reward.parts names several: put it into each part, or leave one"
            " out"
        )
    for name, count in Counter(part.short_name for part in reward.parts).items():
        if count > 1:
            yield f"reward.parts: {count} parts are called {name} in metrics: give each a label of its own"


def _verifier(verifier: VerifierSection, key: str) -> Iterator[str]:
    wall = verifier.wall_timeout_seconds or verifier.timeout_seconds
    if wall < verifier.timeout_seconds:
        yield (
            f"{key}.wall_timeout_seconds {wall:g} is below {key}.timeout_seconds {verifier.timeout_seconds:g}, which"
            " counts processor time: raise the first or lower the second"
        )
    if verifier.memory_gb is not None and ":" not in verifier.name:
        yield (
            f"{key}.memory_gb is for a function of your own, and {key}.name is {verifier.name}: leave {key}.memory_gb"
            " out"
        )
    for name, unset in (("http", HttpSection()), ("code", CodeSection())):
        if verifier.name != name and getattr(verifier, name) != unset:
            yield f"{key}.{name} is read only with {key}.name {name}: set that, or leave {key}.{name} out"
    if verifier.name == "http":
        yield from _http(verifier.http, f"{key}.http")


def _http(server: HttpSection, key: str) -> Iterator[str]:
    url = urlsplit(server.url or "")
    if server.url is None:
        yield f"{key}.url is the server's address, which reward http needs: set it, such as http://127.0.0.1:9000/score"
    elif url.scheme not in ("http", "https") or not url.hostname:
        yield f"{key}.url {server.url!r} is no URL: write it like http://127.0.0.1:9000/score"
    elif url.username is not None or url.password is not None:
        yield f"{key}.url holds a user or password, which logs would show: put a key into {key}.key_file"
    elif server.key_file is not None and url.scheme == "http" and not is_loopback(url.hostname):
        yield (
            f"{key}.key_file would be sent over the network as plain text to {url.hostname}: use an https URL, or"
            " a tunnel to a port of this machine"
        )
