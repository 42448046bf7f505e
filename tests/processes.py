"""Other processes, as the kernel shows them."""

from pathlib import Path


def stands_still(pid: int) -> bool:
    """Whether every thread of a process is stopped; False while threads come and go."""
    try:
        states = [(t / "stat").read_text().rpartition(")")[2].split()[0] for t in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:  # one has ended since
        return False
    return set(states) == {"T"}
