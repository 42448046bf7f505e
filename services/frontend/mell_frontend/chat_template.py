"""The model's own chat template: messages to prompt text, in jinja's sandbox, as transformers renders it."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

FAKE_TEMPLATE = """\
{%- if tools %}{{ '<|system|>You may call functions:\n' }}
{%- for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}
{{- 'Call one with <tool_call>{"name": ..., "arguments": ...}</tool_call>\n' }}{% endif %}
{%- for message in messages %}{{ '<|' + message.role + '|>' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
"""The `fake` model's template."""


class TemplateFaultError(Exception):
    """The template refuses these messages, or fails on them; the message is the template's own."""


class ChatTemplate:
    """One model's template; `tool_source` is used instead of `source` when there are tools."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], tool_source: str | None = None) -> None:
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        self._template = environment.from_string(source)
        self._tool_template = environment.from_string(tool_source) if tool_source else self._template
        variables = find_undeclared_variables(environment.parse(tool_source or source))
        self.supports_tools = "tools" in variables
        self.knows_developer = "developer" in source

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """Return the prompt's text; `variables` are the caller's own. Raises `TemplateFaultError`."""
        template = self._tool_template if tools else self._template
        known = {"messages": messages, "tools": tools, "documents": None}
        try:
            return template.render(
                {**self._special_tokens, "add_generation_prompt": add_generation_prompt, **variables, **known}
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise TemplateFaultError(str(error)) from error


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the template in a model folder, or None if the model has none (a base model).

    Looks in `chat_template.jinja`, `additional_chat_templates/`, `tokenizer_config.json`. Raises
    `TemplateFaultError` for one that is no template.
    """
    config = _read_json(folder / "tokenizer_config.json")
    sources = _sources(folder, config)
    source = sources.get("default") or next(iter(sources.values()), None)
    if source is None:
        return None
    try:
        return ChatTemplate(source, _special_tokens(folder, config), sources.get("tool_use"))
    except TemplateError as error:
        raise TemplateFaultError(f"the chat template in {folder} cannot be read: {error}") from error


def _sources(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    listed = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(listed, list):
        sources = {str(entry["name"]): str(entry["template"]) for entry in listed}
    else:
        sources = {"default": str(listed)} if listed else {}
    if (folder / "chat_template.jinja").is_file():
        sources["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        sources[path.stem] = path.read_text(encoding="utf-8")
    return sources


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    listed = {**_read_json(folder / "special_tokens_map.json"), **config}
    tokens = {}
    for name, value in listed.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = json.loads(path.read_bytes())
    return value if isinstance(value, dict) else {}


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it only has to be understood."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Return jinja set up as transformers' `apply_chat_template` does (transformers/utils/chat_template_utils.py)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: str) -> str:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
