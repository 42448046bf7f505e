import shlex
from pathlib import Path

import kubernetes_validate
import pytest

from mell_console.scaler.settings import ScalerSettings
from mell_frontend.settings import FrontendSettings
from mell_gpu_worker.settings import WorkerSettings
from mell_scheduler.settings import SchedulerSettings
from mell_shared.settings import CommandLineSettings
from tests.deploy.manifests import FOLDER, Resource, build, containers, of_kind, pods

OVERLAYS = ["base", "gpu", "fake", "scaler"]
SETTINGS: dict[str, type[CommandLineSettings]] = {
    "frontend": FrontendSettings,
    "scheduler": SchedulerSettings,
    "gpu-worker": WorkerSettings,
    "scaler": ScalerSettings,
}
ROOT = FOLDER.parents[1]


@pytest.fixture(params=OVERLAYS)
def resources(request: pytest.FixtureRequest) -> list[Resource]:
    """The base and every overlay, built."""
    return build(request.param)


def test_every_overlay_is_tested() -> None:
    """A folder that nobody checks is none that can be trusted."""
    assert {"base", *(path.name for path in (FOLDER / "overlays").iterdir())} == set(OVERLAYS)


def test_kubernetes_takes_every_resource(resources: list[Resource]) -> None:
    """Each is what the API's own schemas say, and holds no field that they do not know."""
    for resource in resources:
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def variables(resources: list[Resource], container: Resource) -> dict[str, str | None]:
    """Return a container's variables, None where the value comes from elsewhere; maps that it takes whole are read."""
    found: dict[str, str | None] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= of_kind(resources, "ConfigMap")[source["configMapRef"]["name"]]["data"]
    for row in container.get("env", []):
        found[row["name"]] = row.get("value")
    return found


def test_every_variable_is_a_setting_of_its_service(resources: list[Resource]) -> None:
    """And has a value that the service takes. Of maps that several take, each knows at least one."""
    shared = {s.variable for cls in SETTINGS.values() for s in cls.listing()}
    for app, container in containers(resources):
        if app not in SETTINGS:
            continue
        given = {name: value for name, value in variables(resources, container).items() if name.startswith("MELL_")}
        own = {row["name"] for row in container.get("env", []) if row["name"].startswith("MELL_")}
        known = {setting.variable for setting in SETTINGS[app].listing()}
        assert own <= known, f"{app} does not know {own - known}"
        assert set(given) <= shared, f"nobody knows {set(given) - shared}"
        values = {n.removeprefix("MELL_").lower(): v for n, v in given.items() if n in known and v and "$(" not in v}
        SETTINGS[app].model_validate(values)


def test_references_are_to_what_there_is(resources: list[Resource]) -> None:
    """Maps, claims, accounts, variables in `$(...)`, ports by name, budgets and services by label."""
    maps, claims = of_kind(resources, "ConfigMap"), of_kind(resources, "PersistentVolumeClaim")
    for template in pods(resources).values():
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for volume in volumes.values():
            assert volume.get("configMap", {}).get("name", next(iter(maps))) in maps
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        if "serviceAccountName" in spec:
            assert spec["serviceAccountName"] in of_kind(resources, "ServiceAccount")
    for app, container in containers(resources):
        known = variables(resources, container)
        for text in [*container.get("command", []), *(value or "" for value in known.values())]:
            for word in text.split("$(")[1:]:
                assert word.partition(")")[0] in known, f"{app}: {text}"
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            action = container.get(probe, {}).get("httpGet") or container.get(probe, {}).get("tcpSocket")
            assert action is None or action["port"] in ports, f"{app}: {probe}"
    for name, service in of_kind(resources, "Service").items():
        names = {
            p["name"] for a, c in containers(resources) if a == service["spec"]["selector"]["app"] for p in c["ports"]
        }
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names, name
    for budget in of_kind(resources, "PodDisruptionBudget").values():
        assert budget["spec"]["selector"]["matchLabels"]["app"] in pods(resources)


def test_ports_are_those_that_the_services_listen_on(resources: list[Resource]) -> None:
    """Settings and images say them; policies let exactly those in that somebody uses."""
    settings = of_kind(resources, "ConfigMap")["mell-settings"]["data"]
    worker = next(c for app, c in containers(resources) if app == "gpu-worker")
    ports = {port["name"]: port["containerPort"] for port in worker["ports"]}
    assert ports["metrics"] == int(settings["MELL_METRICS_PORT"])
    assert ports["kv"] == int(str(variables(resources, worker)["MELL_DATA_PORT"]))
    frontend = next(c for app, c in containers(resources) if app == "frontend")
    dockerfile = (ROOT / "services/frontend/Dockerfile").read_text()
    assert f"MELL_PORT={frontend['ports'][0]['containerPort']}" in dockerfile
    assert "port: 4222" in (ROOT / "services/console/nats/nats.conf").read_text()
    listening = {p["containerPort"] for _, c in containers(resources) for p in c.get("ports", [])}
    for policy in of_kind(resources, "NetworkPolicy").values():
        for row in policy["spec"].get("ingress", []):
            assert {port["port"] for port in row["ports"]} <= listening


def test_probes_ask_for_paths_that_are_there(resources: list[Resource]) -> None:
    """The frontend's own; `/health` and `/metrics` of the others; the end of a broker restarts nobody."""
    served = {"frontend": {"/health", "/ready"}}
    for app, container in containers(resources):
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            action = container.get(kind, {}).get("httpGet")
            if action:
                assert action["path"] in served.get(app, {"/health", "/metrics"})
        if app in {"scheduler", "gpu-worker"}:
            assert container["livenessProbe"]["httpGet"]["path"] == "/metrics"


def test_pods_have_time_to_empty_before_they_are_killed(resources: list[Resource]) -> None:
    """SIGTERM is a drain with a deadline: the pod's grace is longer, preStop included."""
    for app in ("frontend", "gpu-worker"):
        template = pods(resources)[app]
        container = template["spec"]["containers"][0]
        deadline_s = int(str(variables(resources, container)["MELL_STOP_DEADLINE_S"]))
        before = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        assert before[0] == "sleep"
        assert template["spec"]["terminationGracePeriodSeconds"] >= int(before[1]) + deadline_s + 10


def test_nobody_is_root_or_can_become_it(resources: list[Resource]) -> None:
    """As the namespace's own standard demands, and with nothing writable but what is mounted."""
    for template in pods(resources).values():
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for app, container in containers(resources):
        security = container["securityContext"]
        assert not security["allowPrivilegeEscalation"], app
        assert security["readOnlyRootFilesystem"], app
        assert security["capabilities"] == {"drop": ["ALL"]}, app
        assert "memory" in container["resources"]["limits"], app
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, app
    assert of_kind(resources, "Namespace")["mell"]["metadata"]["labels"] == {
        "pod-security.kubernetes.io/enforce": "restricted"
    }


def test_only_the_scaler_may_ask_the_cluster() -> None:
    """No other pod has a token; the scaler's opens one number of one resource."""
    built = build("scaler")
    for app, template in pods(built).items():
        assert template["spec"]["automountServiceAccountToken"] == (app == "scaler"), app
    rule = of_kind(built, "Role")["scaler"]["rules"]
    assert rule == [
        {
            "apiGroups": ["apps"],
            "resources": ["statefulsets/scale"],
            "resourceNames": ["gpu-worker"],
            "verbs": ["get", "patch"],
        }
    ]
    assert "replicas" not in of_kind(built, "StatefulSet")["gpu-worker"]["spec"]


def test_what_may_talk_to_whom_is_closed_by_default(resources: list[Resource]) -> None:
    """One policy denies everything, and no rule but the clients', DNS's, the model's and the API's is without peers."""
    policies = of_kind(resources, "NetworkPolicy")
    assert policies["nothing-else"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        for row in policy["spec"].get("ingress", []):
            assert "from" in row or name == "frontend", name
        for row in policy["spec"].get("egress", []):
            assert "to" in row or name in {"names", "model-pull", "scaler"}, name


def test_gpus_are_asked_for_by_the_overlay_only() -> None:
    """The base runs on CPUs."""
    limits = {o: pods(build(o))["gpu-worker"]["spec"]["containers"][0]["resources"]["limits"] for o in ("base", "gpu")}
    assert limits["gpu"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in limits["base"]


def test_secrets_are_named_as_the_page_makes_them() -> None:
    """Each secret and key that a pod wants is made by a command of the README."""
    words = shlex.split((FOLDER / "README.md").read_text().replace("`", " ").replace("'", " "), comments=False)
    wanted: set[str] = set()
    for overlay in OVERLAYS:
        for _, container in containers(build(overlay)):
            for row in container.get("env", []):
                ref = row.get("valueFrom", {}).get("secretKeyRef")
                wanted |= {ref["name"], ref["key"]} if ref else set()
            wanted |= {s["secretRef"]["name"] for s in container.get("envFrom", []) if "secretRef" in s}
    text = " ".join(words)
    assert not {name for name in wanted if name not in text}


def test_the_python_script_of_the_scaler_is_in_its_map() -> None:
    """It is called by the path that the map is mounted at."""
    built = build("scaler")
    container = pods(built)["scaler"]["spec"]["containers"][0]
    command = str(variables(built, container)["MELL_SCALE_COMMAND"]).split(",")
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(Path(command[1]).parent) in mounts
    assert Path(command[1]).name in of_kind(built, "ConfigMap")["mell-scale-script"]["data"]
