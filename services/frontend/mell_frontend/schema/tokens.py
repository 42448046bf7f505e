"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from typing import Any

from pydantic import Field

from mell_frontend.schema.base import ApiModel, TokenId
from mell_frontend.schema.chat import ChatMessage, Tool


class TokenizeRequest(ApiModel):
    """A text or a conversation to be turned into token ids; `model` may be left out if one is served."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[Tool] = []
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] = {}


class DetokenizeRequest(ApiModel):
    """Token ids to be turned into text."""

    model: str | None = None
    tokens: list[TokenId]
