"""Sets the number of worker replicas from inside the cluster, by its API: `scale.py start|stop COUNT NAME...`.

What deploy/scale/kubectl.sh does, for an image without kubectl. Needs the right to get and patch `statefulsets/scale`.
"""

import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

_ACCOUNT = Path(os.environ.get("KUBE_ACCOUNT_DIR", "/var/run/secrets/kubernetes.io/serviceaccount"))
_API = os.environ.get("KUBE_API", "https://kubernetes.default.svc")
_WORKERS = os.environ.get("KUBE_STATEFULSET", "gpu-worker")


def main(arguments: list[str]) -> int:
    """Return the exit code; what is wrong is one line."""
    if len(arguments) < 3 or arguments[0] not in {"start", "stop"} or not arguments[1].isdigit():
        return _fail("usage: scale.py start|stop COUNT NAME...")
    action, count, name = arguments[0], int(arguments[1]), arguments[2]
    try:
        found = call("GET", None)
        replicas = found["spec"].get("replicas", 0)
        if action == "start" and replicas >= count:
            return 0  # a repeated or late order takes nobody away
        if action == "stop" and (replicas != count + 1 or name != f"{_WORKERS}-{count}"):
            return _fail(f"{name} is not the last of {replicas} replicas, or not {count} would be left")
        # With the version that was read: the API refuses it if somebody else has changed the number since.
        call(
            "PATCH",
            {"metadata": {"resourceVersion": found["metadata"]["resourceVersion"]}, "spec": {"replicas": count}},
        )
    except urllib.error.HTTPError as error:
        return _fail(f"the cluster's API answers {error.code}: {error.read().decode(errors='replace')[:200]}")
    except OSError as error:
        return _fail(f"{_API} does not answer: {error}")
    return 0


def call(method: str, body: Any) -> Any:
    """Return what the API says of the workers' scale."""
    namespace, token = ((_ACCOUNT / name).read_text().strip() for name in ("namespace", "token"))
    url = f"{_API}/apis/apps/v1/namespaces/{namespace}/statefulsets/{_WORKERS}/scale"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, method=method)  # noqa: S310 - the cluster's own API
    request.add_header("authorization", f"Bearer {token}")
    request.add_header("content-type", "application/merge-patch+json")
    trust = ssl.create_default_context(cafile=str(_ACCOUNT / "ca.crt")) if _API.startswith("https") else None
    with urllib.request.urlopen(request, timeout=20, context=trust) as answer:  # noqa: S310 - as above
        return json.loads(answer.read())


def _fail(why: str) -> int:
    sys.stderr.write(f"{why}\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
