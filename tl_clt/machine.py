"""How much memory this process takes, and how much more it can have: of the system, of a container, of a GPU."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

GIB = 2**30
GROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Where Linux tells a container's limit and what is used of it: in the second and in the first version of cgroups."""


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where the system does not say."""
    if device.type == "cuda":
        unused_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused_by_torch
    if device.type != "cpu":
        return None
    of_group = [left for limit, used in GROUP_FILES if (left := _left(limit, used)) is not None]
    return min([psutil.virtual_memory().available, *of_group])


def held_memory(device: torch.device) -> int:
    """Bytes that this process takes on a device now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _left(limit: Path, used: Path) -> int | None:
    """What a container's limit leaves; None where it has none."""
    try:
        of_limit, of_used = limit.read_text().strip(), used.read_text().strip()
    except OSError:
        return None
    # Without a limit, the first version tells a number near 2**63.
    if not of_limit.isdigit() or int(of_limit) >= 2**60:
        return None
    return max(int(of_limit) - int(of_used), 0)
