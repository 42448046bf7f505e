"""What no line of ours may do: rules that hold for the whole tree, read from the sources."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("services/*/mell_*/**/*.py"), *ROOT.glob("shared/mell_shared/**/*.py")])
DOCKERFILES = sorted(ROOT.glob("services/*/Dockerfile"))

CODE_LOADERS = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
"""Modules whose reading of data can run code that stands in it."""

CODE_RUNNERS = {"eval", "exec", "compile", "__import__"}


def faults(tree: ast.AST) -> Iterator[str]:
    """Yield what in a module could run code from data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (f"import {name}" for name in names if name.partition(".")[0] in CODE_LOADERS)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in CODE_LOADERS:
                yield f"from {node.module} import"
        elif isinstance(node, ast.Call):
            yield from faults_of_call(node)


def faults_of_call(call: ast.Call) -> Iterator[str]:
    """Yield what is wrong with a call."""
    named = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    name = ast.unparse(call.func)
    if name in CODE_RUNNERS:
        yield name
    if name.endswith("import_module") and call.args and isinstance(call.args[0], ast.Constant):
        yield from (f"{name} {call.args[0].value}" for _ in [0] if call.args[0].value in CODE_LOADERS)
    if name == "torch.load" and named.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if named.get("allow_pickle") == "True" or named.get("trust_remote_code") == "True" or named.get("shell") == "True":
        yield f"{name} with {named}"
    if name in {"os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}:
        yield name


def test_the_sources_are_found() -> None:
    """The rules look at every package; else they would hold of nothing."""
    packages = {path.relative_to(ROOT).parts[-2 if path.parent.name.startswith("mell_") else 2] for path in SOURCES}
    assert {"mell_shared", "mell_frontend", "mell_scheduler", "mell_gpu_worker", "mell_console"} <= packages
    assert len(SOURCES) > 150


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_can_run(path: Path) -> None:
    """No pickle or its like, no evaluated text, no shell, no code from a model's repository."""
    assert list(faults(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import os.path, marshal",
        "importlib.import_module('pickle')",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_the_rule_sees_what_it_is_for(code: str) -> None:
    """Each of the things forbidden is found; their harmless neighbours are not."""
    assert list(faults(ast.parse(code)))
    assert not list(faults(ast.parse("torch.load(path, weights_only=True); json.loads(text); re.compile('a')")))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_containers_run_as_a_user_of_no_rights(path: Path) -> None:
    """Each image ends as a user with a number of its own that is not root's."""
    lines = path.read_text().splitlines()
    last_stage = lines[max(number for number, line in enumerate(lines) if line.startswith("FROM")) :]
    users = [line.split()[1] for line in last_stage if line.startswith("USER ")]
    assert users == ["mell"]
    made = re.search(r"useradd --uid (\d+)", "\n".join(last_stage))
    assert made is not None
    assert int(made[1]) >= 10_000
    after_user = last_stage[last_stage.index("USER mell") :]
    assert not [line for line in after_user if line.startswith(("RUN", "COPY", "ADD"))]


def test_every_container_gives_its_rights_up() -> None:
    """In the compose file no service keeps a capability, can gain one, or is open to the world by default."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    assert len(compose["services"]) >= 5
    for service in compose["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        assert not {"user", "pid", "ipc", "network_mode"} & service.keys()
        for port in service.get("ports", []):
            assert re.match(r"\$\{MELL_PUBLISH(_[A-Z]+)?:-127\.0\.0\.1:", port)
    assert compose["networks"]["inner"] == {"internal": True}
    for name in ("nats", "scheduler", "gpu_worker", "gpu_worker_cuda", "prometheus"):
        assert compose["services"][name]["networks"] == ["inner"]
