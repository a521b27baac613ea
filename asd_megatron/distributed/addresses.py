"""Network addresses."""

from __future__ import annotations

from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Whether `host`, an address or a name, is this machine's loopback interface; of the names, only localhost is."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
