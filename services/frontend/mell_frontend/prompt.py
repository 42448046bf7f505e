"""From a request's messages or texts to prompt token ids; every problem is an `ApiError`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mell_frontend.chat_template import ChatTemplate, TemplateFaultError
from mell_frontend.errors import bad_request
from mell_frontend.schema.chat import AssistantMessage, ChatMessage, TextPart, Tool, ToolCall, ToolMessage
from mell_frontend.served import ServedModel


def chat_prompt(
    model: ServedModel,
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool],
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Return the prompt ids of a conversation, through the model's own template; raises `ApiError` (400)."""
    template = model.template
    if template is None:
        message = f"The model {model.name!r} has no chat template; use /v1/completions."
        raise bad_request(message, "messages", "no_chat_template")
    if tools and not template.supports_tools:
        message = f"The chat template of {model.name!r} cannot show tools; leave them out or set tool_choice to none."
        raise bad_request(message, "tools", "tools_not_supported")
    shown = [_shown(message, position, template) for position, message in enumerate(messages)]
    listed = [tool.model_dump(exclude_none=True) for tool in tools] or None
    try:
        text = template.render(shown, listed, add_generation_prompt=add_generation_prompt, variables=variables)
    except TemplateFaultError as error:
        raise bad_request(f"The model's chat template refused: {error}.", "messages", "chat_template") from error
    return model.tokenizer.encode(text, add_special_tokens=False)


def text_prompt(model: ServedModel, prompt: str | list[int], param: str, *, add_special_tokens: bool) -> list[int]:
    """Return the ids of one legacy prompt, text or ids already; raises `ApiError` (400)."""
    if isinstance(prompt, str):
        ids = model.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    else:
        ids = prompt
        check_ids(model, ids, param)
    if not ids:
        raise bad_request(f"{param}: the prompt must hold at least one token.", param, "empty_prompt")
    return ids


def check_ids(model: ServedModel, token_ids: Sequence[int], param: str) -> None:
    """Raise `ApiError` (400) if an id is not in the model's vocabulary."""
    highest = max(token_ids, default=0)
    if highest >= model.tokenizer.vocab_size:
        limit = model.tokenizer.vocab_size - 1
        message = f"{param}: token id {highest} is not in the vocabulary (0 to {limit})."
        raise bad_request(message, param, "invalid_token_id")


def _shown(message: ChatMessage, position: int, template: ChatTemplate) -> dict[str, Any]:
    """Return the message as templates know it: text content, arguments as objects, no role they never heard of."""
    role: str = message.role
    if role == "developer" and not template.knows_developer:
        role = "system"
    shown: dict[str, Any] = {"role": role, "content": _text(message.content)}
    if message.name is not None:
        shown["name"] = message.name
    if isinstance(message, ToolMessage):
        shown["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        if message.reasoning_content is not None:
            shown["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            where = f"messages[{position}].tool_calls"
            calls = enumerate(message.tool_calls)
            shown["tool_calls"] = [_call(call, f"{where}[{place}].function.arguments") for place, call in calls]
    return shown


def _text(content: str | list[TextPart] | None) -> str:
    if isinstance(content, list):
        return "\n".join(part.text for part in content)
    return content or ""


def _call(call: ToolCall, param: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise bad_request(f"{param}: must be JSON text.", param, "invalid_value") from error
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
