"""The request bodies, validated once at the door."""

from mell_frontend.schema.chat import ChatCompletionRequest
from mell_frontend.schema.completion import CompletionRequest
from mell_frontend.schema.parse import parse, unknown_fields
from mell_frontend.schema.tokens import DetokenizeRequest, TokenizeRequest

__all__ = [
    "ChatCompletionRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "TokenizeRequest",
    "parse",
    "unknown_fields",
]
