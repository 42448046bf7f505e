"""What a user is told when a request cannot be served: OpenAI error bodies, made here and nowhere else."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mell_frontend.generation import GenerationError
from mell_frontend.rate_limits import Exceeded


class ApiError(Exception):
    """A request that cannot be served; becomes an OpenAI error body with an HTTP status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        """Return the JSON body that OpenAI clients know how to read."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a request that the client must change."""
    return ApiError(400, message, param=param, code=code)


def model_not_found(model: str, served: Sequence[str]) -> ApiError:
    """Return the 404 for a model that is not served, naming those that are."""
    names = ", ".join(served)
    message = f"The model {_shown(model)!r} does not exist; served here: {names}."
    return ApiError(404, message, param="model", code="model_not_found")


def context_exceeded(limit: int, prompt_tokens: int, output_tokens: int | None, param: str) -> ApiError:
    """Return the 400 for a prompt and output that can never fit, saying the limit."""
    asked = f"{prompt_tokens} in the prompt"
    if output_tokens is not None:
        asked += f" and {output_tokens} for the output"
    message = f"This model's maximum context length is {limit} tokens, but the request asks for {asked}."
    return bad_request(message, param, "context_length_exceeded")


_GENERATION_ERRORS: dict[str, tuple[int, str, str]] = {
    "too_large": (400, "invalid_request_error", "context_length_exceeded"),
    "refused": (400, "invalid_request_error", "refused"),
    "unknown_model": (404, "invalid_request_error", "model_not_found"),
    "queue_full": (429, "rate_limit_error", "queue_full"),
    "unavailable": (503, "server_error", "unavailable"),
    "failed": (500, "server_error", "generation_failed"),
}


def from_generation(error: GenerationError) -> ApiError:
    """Return the HTTP form of a problem behind the gateway, with `Retry-After` where waiting helps."""
    status, kind, code = _GENERATION_ERRORS.get(error.kind, _GENERATION_ERRORS["failed"])
    message = error.message
    if error.limit_tokens is not None and str(error.limit_tokens) not in message:
        message = f"{message} (limit: {error.limit_tokens} tokens)"
    answer = ApiError(status, message, kind=kind, code=code)
    if status in (429, 503):
        answer.headers["Retry-After"] = str(max(1, round(error.retry_after_s or 1)))
    return answer


def rate_limited(key: str, exceeded: Exceeded) -> ApiError:
    """Return the 429 for a key over one of its limits, as OpenAI words it, saying when to come back."""
    short = {"requests": "RPM", "tokens": "TPM"}[exceeded.kind]
    numbers = f"on {exceeded.kind} per min ({short}): Limit {exceeded.limit}, "
    if exceeded.wait_us is None:
        message = f"Request too large for key {key!r} {numbers}Requested {exceeded.requested}. Ask for less at once."
    else:
        seconds = f"{exceeded.wait_us / 1e6:.3f}".rstrip("0").rstrip(".")
        numbers += f"Used {exceeded.used}, Requested {exceeded.requested}"
        message = f"Rate limit reached for key {key!r} {numbers}. Please try again in {seconds}s."
    fault = ApiError(429, message, kind=exceeded.kind, code="rate_limit_exceeded")
    if exceeded.wait_us is None:
        fault.headers["x-should-retry"] = "false"  # OpenAI's clients repeat a 429 by themselves, and never will succeed
    else:
        fault.headers["Retry-After"] = str(max(1, -(-exceeded.wait_us // 1_000_000)))
        fault.headers["retry-after-ms"] = str(max(1, -(-exceeded.wait_us // 1000)))
    return fault


def from_validation(error: ValidationError, body: Any) -> ApiError:
    """Return the 400 for a body that is JSON but not the request it should be; names the first wrong field."""
    fault = error.errors(include_url=False)[0]
    param = _path(fault["loc"], body, missing=fault["type"] == "missing")
    message = fault["msg"].removeprefix("Value error, ").replace(" after validation", "")
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        param, message = _wrong_tag(param, fault)
    place = f"{param}: " if param else ""
    return bad_request(f"{place}{message}.".replace("..", "."), param or None, "invalid_value")


def _wrong_tag(param: str, fault: ErrorDetails) -> tuple[str, str]:
    """Name the field that says which of several forms an object has (a message's `role`), and what it may be."""
    names = fault["ctx"]
    field, expected = names["discriminator"].strip("'"), names.get("expected_tags")
    if expected is None:
        return f"{param}.{field}", "Field required"
    return f"{param}.{field}", f"must be one of {expected}, got {_shown(names['tag'])!r}"


def _path(loc: tuple[int | str, ...], body: Any, *, missing: bool) -> str:
    """Return `loc` as `messages[0].content`, without the names of union members that pydantic puts in."""
    text, value = "", body
    for position, part in enumerate(loc):
        if isinstance(value, dict) and (part in value or (missing and position == len(loc) - 1)):
            text += f".{_shown(str(part))}" if text else _shown(str(part))
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            text += f"[{part}]"
            value = value[part]
    return text


def _shown(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."
