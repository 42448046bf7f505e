"""From the bytes of a body to a request model, with every fault told as an OpenAI error."""

from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from mell_frontend.errors import bad_request, from_validation
from mell_frontend.schema.base import ApiModel

R = TypeVar("R", bound=ApiModel)

_SHOWN_FIELDS = 8


def parse(model: type[R], body: bytes) -> R:
    """Return the request in `body`; raises `ApiError` (400), never with the content in its message."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object.", code="invalid_json")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation(error, value) from error


def unknown_fields(request: ApiModel) -> tuple[list[str], int]:
    """Return the names of the first few fields that mean nothing here (cut short), and how many there are."""
    extra = request.model_extra or {}
    return [name[:40] for name in list(extra)[:_SHOWN_FIELDS]], len(extra)
