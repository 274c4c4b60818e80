"""The most memory that this process has held."""

from pathlib import Path


def peak_gib() -> float:
    """GiB of resident memory at its highest, by Linux.

    Not ``ru_maxrss``: a process inherits that of its parent, however large that was.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20
