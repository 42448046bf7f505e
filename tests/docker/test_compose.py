import json
from collections.abc import Iterator

import openai
import pytest

from tests.docker.conftest import ComposedStack

# Building four images, one of them with torch, takes minutes.
pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]


def stream(stack: ComposedStack, max_tokens: int) -> Iterator[tuple[str, str]]:
    """Yield the id of a chat answer with each piece of its text, through the published port to the official client."""
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", timeout=60) as client:
        chunks = client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=max_tokens,
            seed=7,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for chunk in chunks:
            if chunk.choices:
                yield chunk.id, chunk.choices[0].delta.content or ""


def chat(stack: ComposedStack, max_tokens: int = 16) -> str:
    """Return the text of a chat answer."""
    return "".join(text for _, text in stream(stack, max_tokens))


def bench(stack: ComposedStack) -> dict[str, object]:
    """Return the report of forty requests sent from a container on the stack's inner network."""
    flags = ["--requests", "40", "--concurrency", "10", "--output-tokens", "32", "--json", "-"]
    report: dict[str, object] = json.loads(stack.mell("bench", "http://frontend:8000", *flags))
    return report


def test_the_compose_file_is_valid_with_and_without_gpus(stack: ComposedStack) -> None:
    """Compose accepts the file both ways, and without the profile no container asks for a device."""
    stack.compose("config", "-q")
    stack.compose("--profile", "gpu", "config", "-q")
    assert not any("cuda" in name for name in stack.containers())


def test_the_stack_answers_a_chat_also_with_four_workers(stack: ComposedStack) -> None:
    """A chat is answered through compose's network; after scaling four workers serve, and the text is the same."""
    first = chat(stack)
    assert first
    assert bench(stack)["whole"] == 40
    stack.up(workers=4)
    assert {str(worker["model"]) for worker in stack.workers()} == {"fake"}
    assert bench(stack)["whole"] == 40
    assert chat(stack) == first


def test_a_request_moves_from_container_to_container_while_it_runs(stack: ComposedStack) -> None:
    """An operator moves its KV through the inner network; the client reads the text of a request left alone."""
    alone = chat(stack, 1_500)
    pieces = stream(stack, 1_500)
    request, text = next(pieces)
    told = json.loads(stack.mell("status", "--requests", "--json"))
    (here,) = {row["worker"] for row in told["sequences"] if row["sequence"].startswith(request)}
    there = next(row["worker"] for row in told["workers"] if row["worker"] != here)
    (move,) = json.loads(stack.mell("migrate", request, "--to", there, "--mode", "kv", "--json"))["moves"]
    assert (move["state"], move["move"]["target"]) == ("committed", there)
    assert move["move"]["copied_bytes"] > 100_000
    assert text + "".join(more for _, more in pieces) == alone


@pytest.mark.parametrize("image", ["console", "frontend", "gpu-worker", "scheduler"])
def test_no_image_runs_as_root(stack: ComposedStack, image: str) -> None:
    """Every image's user is an ordinary one."""
    assert stack.docker("run", "--rm", "--entrypoint", "id", stack.image(image), "-u").strip() == "10001"


def test_only_workers_carry_torch(stack: ComposedStack) -> None:
    """The frontend's and the scheduler's images stay small: there is no torch in them."""
    look = "import importlib.util, sys; sys.stdout.write(str(importlib.util.find_spec('torch') is not None))"
    found = {
        image: stack.docker("run", "--rm", "--entrypoint", "python", stack.image(image), "-c", look)
        for image in ("frontend", "scheduler", "gpu-worker")
    }
    assert found == {"frontend": "False", "scheduler": "False", "gpu-worker": "True"}


def test_every_service_stops_cleanly_when_asked(stack: ComposedStack) -> None:
    """SIGTERM reaches each program: all end with code 0 and none is killed; then they come back."""
    stack.compose("stop")
    codes = {name: state["ExitCode"] for name, state in stack.containers().items()}
    assert set(codes.values()) == {0}, codes
    stack.up(workers=2)
    assert chat(stack)
