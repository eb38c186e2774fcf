"""What connects the processes of a run, and what its errors mean."""

from __future__ import annotations

import contextlib
import os
import re
import socket

import psutil
import torch.distributed as dist

# What gloo and NCCL say when another process has gone or no longer answers ...
LOST = (
    *("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Application timeout"),
    *("remote process", "remote peer", "Connection was likely closed"),
)
# ... and gloo when it could not be reached in the first place.
UNREACHABLE = ("Unable to find", "connectFullMesh", "timed out connecting", "Connection refused")


def failure(error: Exception) -> str | None:
    """The line for an error in which processes do not reach each other; None for any other."""
    if not isinstance(error, RuntimeError):
        return None
    if dist.is_initialized() and any(phrase in str(error) for phrase in LOST):
        return (
            f"another process of the run has gone or hangs ({reason(error)}): --resume auto goes "
            "on from the last checkpoint"
        )
    if where := meeting_place(error):
        return f"the processes of the run cannot work together: {reason(error)}{where}"
    return None


def reason(error: Exception) -> str:
    """What an error of torch says, without the places in its source that said it."""
    text = str(error).split("\nException raised from")[0]
    text = text.rpartition("Last error:\n")[2].strip() or text.strip() or type(error).__name__
    line = text.splitlines()[0].split(" This is typically caused")[0]
    return re.sub(r"^\[(?:enforce fail at )?\S*gloo\S*\] (?:\S+ != \S+ )?", "", line)


def meeting_place(error: Exception) -> str:
    """The variables that say where processes meet; empty for an error that is not the network's."""
    if not (isinstance(error, dist.DistError) or any(p in str(error) for p in UNREACHABLE)):
        return ""
    names = ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    found = (f"{name}={os.environ[name]}" for name in names if name in os.environ)
    return f" ({' '.join(found)})"


def find_interface() -> str:
    """The network interface between the nodes, for gloo.

    By itself gloo takes the address that the node's name resolves to, which may be 127.0.1.1.
    This is NCCL's choice: what NCCL_SOCKET_IFNAME says, then what leads to the main process, then
    the first one, loopback and Docker's last.
    """
    addresses, states = psutil.net_if_addrs(), psutil.net_if_stats()
    asked = os.environ.get("NCCL_SOCKET_IFNAME", "")
    names = tuple(filter(None, asked.lstrip("^=").split(",")))
    towards_main = ""
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", ""), 9))  # sends nothing
        towards_main = probe.getsockname()[0]

    def preference(interface: str) -> list[bool]:
        own = {address.address for address in addresses[interface]}
        is_named = interface in names if "=" in asked else interface.startswith(names)
        return [
            bool(names) and is_named == asked.startswith("^"),
            any(address.startswith("127.") for address in own),
            towards_main not in own,
            interface.startswith(("docker", "br-", "veth", "virbr")),
        ]

    inet: list[str] = [
        name
        for name, own in addresses.items()
        if name in states
        and states[name].isup  # an alias has no state of its own
        and any(a.family in (socket.AF_INET, socket.AF_INET6) for a in own)
    ]
    return min(inet, key=preference)
