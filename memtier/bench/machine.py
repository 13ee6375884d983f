"""Where a measurement was made, and what the process weighs: a speed without these is not a result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from memtier.errors import ConfigError
from memtier.reports import SessionStats

__all__ = ["describe_machine", "resident_bytes", "selected_from_disk", "use_threads"]

_LIBRARIES = ("memtier", "torch", "transformers", "lancedb", "numpy")


def describe_machine() -> dict[str, object]:
    """Machine, versions and commit, ready for JSON; `commit` is None outside a git checkout."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "commit": _commit(),
    }


def resident_bytes() -> int:
    """Resident memory of this process now (not its peak)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    listed = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, text=True, check=True)
    return int(listed.stdout) * 1024


def selected_from_disk(stats: SessionStats) -> float | None:
    """Share of the retrieved blocks that were read from disk, not found in host memory; None if none was retrieved."""
    fetched = stats.blocks_from_disk + stats.blocks_from_hot
    return stats.blocks_from_disk / fetched if fetched else None


def use_threads(count: int) -> None:
    """Compute on so many CPU threads.

    The operations of a model as small as nano are shorter than a hand-over between threads: on a core that is wanted by
    anything else, every operation waits for it. So what is measured here is measured on one, unless asked otherwise.

    Raises:
        ConfigError: fewer than one.
    """
    import torch

    if count < 1:
        raise ConfigError(f"--threads is {count}; there must be at least one.")
    torch.set_num_threads(count)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit this file was run from, with a + if the checkout holds uncommitted changes."""
    # An environment inside somebody's repository is not our checkout: git must know this very file.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git("describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")


def _git(*arguments: str) -> str | None:
    """What git prints for this folder, or None where there is no git, no checkout, or no answer."""
    command = ["git", *arguments]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
