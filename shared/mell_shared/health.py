"""A health check for containers: `python -m mell_shared.health http://127.0.0.1:9100/health` exits 0 or 1."""

import http.client
import sys
import urllib.error
import urllib.request

_TIMEOUT_S = 3.0


def check(url: str, timeout_s: float = _TIMEOUT_S) -> str:
    """Return what is wrong with the service at `url`, an http one; empty if it answers 200."""
    if not url.startswith(("http://", "https://")):
        return f"{url!r} is no http address"
    # A proxy of the environment must not stand between a container and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as response:
            return "" if response.status == 200 else f"{url} answers {response.status}"
    except urllib.error.HTTPError as error:
        error.close()
        return f"{url} answers {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{url} does not answer: {error}"


def main(arguments: list[str]) -> int:
    """Check the one URL in `arguments`; return the exit code."""
    problem = check(arguments[0]) if len(arguments) == 1 else "usage: python -m mell_shared.health URL"
    if problem:
        sys.stderr.write(f"{problem}\n")
    return 1 if problem else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
