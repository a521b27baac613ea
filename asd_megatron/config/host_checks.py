"""Keys of the `rollout` section about servers on other nodes that cannot work together."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from asd_megatron.config.refusals import changed
from asd_megatron.config.rollout import RolloutSection
from asd_megatron.distributed.addresses import is_loopback

NAME = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:-]*")
PLACEHOLDER = "{host}"


def hosts_of(entry: str) -> list[str]:
    """The hosts of one server: `a+b` are two."""
    return [name.strip() for name in entry.split("+")]


def host_of_server(hosts: Sequence[str], server: int) -> str:
    """The entry of `rollout.server_hosts` on which server number `server` runs."""
    return hosts[server % len(hosts)]


def host_findings(rollout: RolloutSection) -> Iterator[str]:
    """What cannot work, one finding a yield, each with its remedy."""
    if rollout.server_keys is not None and not rollout.server_urls:
        yield (
            "rollout.server_keys are those of the running servers in rollout.server_urls; servers that the run starts"
            " get new ones: leave it out"
        )
    if not rollout.server_hosts:
        for key in changed(rollout, "server_launcher", "server_port"):
            yield f"rollout.{key} is read only with rollout.server_hosts: name hosts there, or leave it out"
        return
    if rollout.server_urls:
        yield (
            "rollout.server_hosts is for servers that the run starts, and rollout.server_urls names running ones: leave"
            " one of the two out"
        )
    if rollout.placement == "colocated" and any(len(hosts_of(entry)) > 1 for entry in rollout.server_hosts):
        yield (
            "rollout.placement colocated: a server over two hosts has no memory of one node's ranks to share: name one"
            " host for each server, or set rollout.placement disaggregated"
        )
    yield from _names(rollout)
    yield from _launcher(rollout.server_launcher)
    if rollout.weight_sync == "distributed" and is_loopback(rollout.weight_sync_address or ""):
        far = [name for entry in rollout.server_hosts for name in hosts_of(entry) if not is_loopback(name)]
        if far:
            yield unreachable(rollout.weight_sync_address or "", far[0])


def unreachable(address: str, server: str) -> str:
    """The message about a weight-sync address on loopback with a server elsewhere."""
    return (
        f"rollout.weight_sync_address {address} cannot be reached from {server}: name this machine's address on the"
        " cluster's network, or leave it out"
    )


def _names(rollout: RolloutSection) -> Iterator[str]:
    entries = rollout.server_hosts
    for entry in entries:
        names = hosts_of(entry)
        if not all(NAME.fullmatch(name) for name in names):
            yield (
                f"rollout.server_hosts: {entry!r} is no host's name or address, nor two joined by +: write letters,"
                " digits and . - _ : alone (a user belongs to rollout.server_launcher: ssh -l USER {host})"
            )
        elif len(names) > 2 or len(set(names)) < len(names):
            yield f"rollout.server_hosts: {entry!r}: a server runs on one host or on two different ones, `a+b`"
        elif rollout.server_tensor_parallel % len(names):
            yield (
                f"rollout.server_hosts: {entry!r} divides the {rollout.server_tensor_parallel} ranks of a server over"
                " two hosts: make rollout.server_tensor_parallel even"
            )
    counts = Counter(name for entry in entries for name in set(hosts_of(entry)))
    twice = next((name for name in counts if counts[name] > 1), None)
    if twice is not None:
        yield f"rollout.server_hosts names {twice} twice: name it once; servers are dealt to the hosts in turn"
    if len({len(hosts_of(entry)) for entry in entries}) > 1:
        yield "rollout.server_hosts mixes servers on one host and on two: give every server equally many hosts"
    if len(entries) > rollout.servers:
        yield (
            f"rollout.server_hosts has room for {len(entries)} servers and rollout.servers is {rollout.servers}: raise"
            " it, or name fewer hosts"
        )


def _launcher(text: str | None) -> Iterator[str]:
    if text is None:
        return
    try:
        words = shlex.split(text)
    except ValueError as error:
        yield f"rollout.server_launcher {text!r} is no command ({error}): close its quotes"
        return
    if not any(PLACEHOLDER in word for word in words):
        yield (
            f"rollout.server_launcher {text!r} does not say where: write {PLACEHOLDER} for the host's name, for"
            f" instance ssh -o BatchMode=yes {PLACEHOLDER}"
        )


def url_findings(rollout: RolloutSection) -> Iterator[str]:
    """Running servers that cannot reach the trainer's weight-sync address."""
    far = [url for url in rollout.server_urls if not is_loopback(urlsplit(url).hostname or "")]
    if rollout.weight_sync == "distributed" and far and is_loopback(rollout.weight_sync_address or ""):
        yield unreachable(rollout.weight_sync_address or "", far[0])
