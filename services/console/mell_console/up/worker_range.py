"""A number of workers, or a range of them, as it is written: 2 or 1..4."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

_MOST = 256


def bounds(text: str) -> tuple[int, int]:
    """Return the least and the most of a number or a range; raises `ValueError`."""
    found = re.fullmatch(r"(\d{1,4})(?:\.\.(\d{1,4}))?", text.strip())
    if found is None:
        raise ValueError("give a number of workers such as 2, or a range such as 1..4")
    least, most = int(found[1]), int(found[2] or found[1])
    if not 1 <= least <= most <= _MOST:
        raise ValueError(f"give 1 to {_MOST} workers, of a range the smaller number first")
    return least, most


def _checked(text: str) -> str:
    bounds(text)
    return text.strip()


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) else value


WorkerRange = Annotated[str, BeforeValidator(_as_text), AfterValidator(_checked)]
"""Written as `bounds` reads it."""
