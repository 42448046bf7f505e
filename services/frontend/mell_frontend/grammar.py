"""Constraints on the output in llguidance's form: JSON, a JSON schema, calls of functions; checked at the door."""

import json
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from mell_frontend.errors import bad_request
from mell_frontend.schema.chat import FunctionDefinition
from mell_frontend.schema.sampling import ResponseFormat
from mell_frontend.tools import BEGIN, END
from mell_shared.messages.sampling import Grammar

_GUIDANCE = {"whitespace_pattern": "[ \\n]{1,20}"}
"""Small models can write space for ever where any amount of it is allowed."""


def response_schema(form: ResponseFormat | None) -> dict[str, Any] | None:
    """Return the JSON schema that a response format asks for, or None for free text; raises `ApiError`."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.json_schema is None:
        raise bad_request("response_format.json_schema: Field required.", "response_format.json_schema")
    return _as_object(form.json_schema.schema_, "response_format.json_schema.schema")


def json_grammar(schema: dict[str, Any], param: str) -> Grammar:
    """Return the grammar of the JSON texts that fit `schema`; raises `ApiError` (400) if there can be none."""
    text: str = LLMatcher.grammar_from_json_schema({**schema, "x-guidance": _GUIDANCE})
    return _checked(text, param)


def calls_grammar(
    functions: Sequence[FunctionDefinition], *, several: bool, special_marks: bool, answer: dict[str, Any] | None = None
) -> Grammar:
    """Return the grammar of one call of one of `functions`, or of `several`; instead, if given, an `answer`.

    With `special_marks` the marks are special tokens of the vocabulary, which plain text does not match.
    Raises `ApiError` (400) for parameters that cannot be met.
    """
    begin, end = (f"({mark} | {json.dumps(mark)})" if special_marks else json.dumps(mark) for mark in (BEGIN, END))
    rules = [_call_rule(position, function, begin, end) for position, function in enumerate(functions)]
    call = " | ".join(f"call{position}" for position in range(len(functions)))
    start = f'calls: one ("\\n" one)*\none: {call}' if several else f"calls: {call}"
    either = f"start: calls | {_json(answer)}" if answer is not None else "start: calls"
    lark: str = LLMatcher.grammar_from_lark("\n".join([either, start, *rules]))
    return _checked(lark, "tools")


def _call_rule(position: int, function: FunctionDefinition, begin: str, end: str) -> str:
    head = json.dumps(f'\n{{"name": {json.dumps(function.name)}, "arguments": ')
    tail = json.dumps("}\n")
    parameters = function.parameters
    if parameters is None:
        return f"call{position}: {begin} {head} {json.dumps('{}')} {tail} {end}"
    return f"call{position}: {begin} {head} {_json(parameters)} {tail} {end}"


def _json(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _GUIDANCE})}"


def _as_object(schema: dict[str, Any] | bool, param: str) -> dict[str, Any]:
    if schema is False:
        raise bad_request(f"{param}: no output can fit the schema `false`.", param, "invalid_json_schema")
    return {} if schema is True else schema


def _checked(grammar: str, param: str) -> Grammar:
    fault: str = LLMatcher.validate_grammar(grammar)
    if fault and not fault.startswith("WARNING"):
        raise bad_request(f"{param}: the schema cannot be met: {_reason(fault)}.", param, "invalid_json_schema")
    return Grammar(text=grammar)


def _reason(fault: str) -> str:
    """Return llguidance's reason without the grammar it quotes, on one line."""
    reason = fault.partition("failed to compile JSON schema: ")[2].partition("\n   1 | ")[0] or fault
    return " ".join(reason.split())[:300]
