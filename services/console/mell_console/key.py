"""`mell key`: makes an API key. The entry for the keys file goes to standard output, the key itself beside it."""

import sys

from mell_frontend.keys import KeysFileError, new_key, show_entry


def run(name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> int:
    """Print an entry that lets a new key in, and on standard error the key; return the exit code."""
    key = new_key()
    try:
        entry = show_entry(name, key, requests_per_minute, tokens_per_minute)
    except KeysFileError as error:
        sys.stderr.write(f"mell: {error}\n")
        return 2
    sys.stderr.write(f"The key, shown only now: {key}\n")
    sys.stdout.write(entry)
    return 0
