"""A child's log on disk: appended to, and turned over once so that a long run cannot fill the disk."""

from pathlib import Path

_LARGEST_BYTES = 64 << 20


class LogFile:
    """Writes lines to `path`; beyond 64 MiB the file becomes `path.1`, in place of the one before."""

    def __init__(self, path: Path, largest_bytes: int = _LARGEST_BYTES) -> None:
        self.path = path
        self._largest_bytes = largest_bytes
        self._file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """Append one line; raises `OSError`, and may then be asked again."""
        if not self._file.closed and self._file.tell() > self._largest_bytes:
            self._file.close()
            self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        if self._file.closed:
            self._file = self.path.open("ab", buffering=0)
        self._file.write(line.encode() + b"\n")

    def close(self) -> None:
        """Close the file; safe to repeat."""
        self._file.close()
