"""The manifests of deploy/kubernetes, built as kustomize builds them, as far as they use it."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
Resource = dict[str, Any]


def build(overlay: str) -> list[Resource]:
    """Return the resources of `base` or of an overlay."""
    return _build(FOLDER / ("base" if overlay == "base" else f"overlays/{overlay}"))


def _build(folder: Path) -> list[Resource]:
    told = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "namespace", "resources", "patches", "images", "configMapGenerator"}
    assert set(told) <= known, "this test would not build it as kustomize does"
    found: list[Resource] = []
    for name in told["resources"]:
        path = folder / name
        found += _build(path.resolve()) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for made in told.get("configMapGenerator", []):
        data = {name: (folder / name).read_text() for name in made["files"]}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": made["name"]}, "data": data})
    for patch in told.get("patches", []):
        found = _patched(found, patch)
    return found


def _patched(resources: list[Resource], patch: dict[str, Any]) -> list[Resource]:
    kind, name = patch["target"]["kind"], patch["target"]["name"]
    [target] = [row for row in resources if (row["kind"], row["metadata"]["name"]) == (kind, name)]
    body = yaml.safe_load(patch["patch"])
    if isinstance(body, dict):
        assert body["$patch"] == "delete", "other merges are not built here"
        return [row for row in resources if row is not target]
    changed = copy.deepcopy(target)
    for step in body:
        _apply(changed, step)
    return [changed if row is target else row for row in resources]


def _apply(value: Any, step: dict[str, Any]) -> None:
    """Apply one operation of a JSON patch in place, by its rules: `replace` and `remove` need what they name."""
    *way, last = [part.replace("~1", "/").replace("~0", "~") for part in step["path"].split("/")[1:]]
    for part in way:
        value = value[int(part)] if isinstance(value, list) else value[part]
    if isinstance(value, list):
        assert step["op"] == "add" or int(last) < len(value), step["path"]
        if step["op"] == "replace":
            value[int(last)] = step["value"]
        else:
            assert step["op"] == "add"
            value.insert(len(value) if last == "-" else int(last), step["value"])
        return
    assert step["op"] == "add" or last in value, f"nothing is at {step['path']}"
    if step["op"] == "remove":
        del value[last]
    else:
        value[last] = step["value"]


def pods(resources: list[Resource]) -> dict[str, Resource]:
    """Return the pod template of each workload, by its `app`."""
    templates = [row["spec"]["template"] for row in resources if "template" in row.get("spec", {})]
    return {template["metadata"]["labels"]["app"]: template for template in templates}


def containers(resources: list[Resource]) -> Iterator[tuple[str, Resource]]:
    """Yield each container with its pod's `app`."""
    for app, template in pods(resources).items():
        spec = template["spec"]
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            yield app, container


def of_kind(resources: list[Resource], kind: str) -> dict[str, Resource]:
    """Return the resources of a kind by name."""
    return {row["metadata"]["name"]: row for row in resources if row["kind"] == kind}
