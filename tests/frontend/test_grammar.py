import json

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from mell_frontend.errors import ApiError
from mell_frontend.grammar import calls_grammar, json_grammar, response_schema
from mell_frontend.schema.chat import FunctionDefinition
from mell_frontend.schema.sampling import ResponseFormat
from mell_shared.messages.sampling import Grammar


class _Bytes:
    eos_token_id = 257
    bos_token_id = 256
    tokens = [*(bytes((byte,)) for byte in range(256)), b"<bos>", b"<eos>", b"<tool_call>", b"</tool_call>"]
    special_token_ids = (256, 257, 258, 259)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()))


def accepts(grammar: Grammar, ids: str | list[int]) -> bool:
    """Whether the worker's matcher takes all of `ids` (or the text's bytes) and could end there."""
    ids = list(ids.encode()) if isinstance(ids, str) else ids
    matcher = LLMatcher(TOKENIZER, grammar.text)
    return matcher.try_consume_tokens(ids) == len(ids) and bool(matcher.is_accepting())


PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["age"]}


def test_json_fits_its_schema() -> None:
    """Texts that fit are taken, pretty-printed too; others are not."""
    grammar = json_grammar(PERSON, "response_format")
    assert accepts(grammar, '{"name": "x", "age": 3}')
    assert accepts(grammar, '{\n    "age": 3\n}')
    assert not accepts(grammar, '{"name": "x"}')
    assert not accepts(grammar, '{"age": "3"}')


def test_space_has_a_bound() -> None:
    """A model cannot write space for ever where JSON allows it."""
    assert not accepts(json_grammar({"type": "object"}, "x"), "{" + " " * 200 + "}")


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}, PERSON),
        ({"type": "json_schema", "json_schema": {"name": "p", "schema": True}}, {}),
    ],
)
def test_response_formats(form: dict[str, object], schema: object) -> None:
    """Each form asks for its schema."""
    assert response_schema(ResponseFormat.model_validate(form)) == schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "integer", "minimum": 10, "maximum": 1}, "minimum (10) is greater than maximum (1)"),
        ({"type": "foo"}, "Invalid type: foo"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "incompatible types"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"$ref": "http://example.com/schema"}, "not present"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"enum": []}, "empty"),
    ],
)
def test_impossible_schemas_are_told_at_the_door(schema: dict[str, object], reason: str) -> None:
    """A schema that nothing fits, or that is none, is a 400 that says why; as parameters of a function too."""
    with pytest.raises(ApiError) as told:
        json_grammar(schema, "response_format.json_schema.schema")
    assert reason in told.value.message
    assert (told.value.status, told.value.code) == (400, "invalid_json_schema")
    with pytest.raises(ApiError) as told:
        calls_grammar([FunctionDefinition(name="f", parameters=schema)], several=True, special_marks=False)
    assert reason in told.value.message
    assert told.value.param == "tools"


def test_a_schema_without_outputs_or_without_itself() -> None:
    """The schema `false`, and a json_schema format without a schema object, are refused."""
    for form in ({"type": "json_schema", "json_schema": {"name": "p", "schema": False}}, {"type": "json_schema"}):
        with pytest.raises(ApiError) as told:
            response_schema(ResponseFormat.model_validate(form))
        assert told.value.status == 400


def test_a_schema_nested_too_deep_is_refused() -> None:
    """Depth beyond the compiler's limit is a clear error, not a crash."""
    schema: dict[str, object] = {"type": "string"}
    for _ in range(500):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ApiError, match="recursion limit"):
        json_grammar(schema, "response_format")


FUNCTIONS = [
    FunctionDefinition(
        name="move",
        parameters={
            "type": "object",
            "properties": {"to": {"$ref": "#/$defs/P"}},
            "$defs": {"P": {"enum": ["a", "b"]}},
        },
    ),
    FunctionDefinition(name="stay"),
]


def call(name: str, arguments: object) -> str:
    """Return a call as the grammar spells it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def test_forced_calls() -> None:
    """With forced calls the output is one right call or several, and nothing else."""
    grammar = calls_grammar(FUNCTIONS, several=True, special_marks=False)
    assert accepts(grammar, call("move", {"to": "a"}))
    assert accepts(grammar, call("move", {"to": "b"}) + "\n" + call("stay", {}))
    assert not accepts(grammar, call("move", {"to": "c"}))
    assert not accepts(grammar, call("stay", {"x": 1}))
    assert not accepts(grammar, call("other", {}))
    assert not accepts(grammar, "Hello")
    assert not accepts(calls_grammar(FUNCTIONS, several=False, special_marks=False), call("stay", {}) * 2)


def test_marks_may_be_special_tokens() -> None:
    """Where the vocabulary has special tokens for the marks, they are taken as well as their spelling."""
    inner = list(b'\n{"name": "stay", "arguments": {}}\n')
    grammar = calls_grammar(FUNCTIONS, several=False, special_marks=True)
    assert accepts(grammar, [258, *inner, 259])
    assert accepts(grammar, call("stay", {}))
    assert not accepts(calls_grammar(FUNCTIONS, several=False, special_marks=False), [258, *inner, 259])


def test_an_answer_may_stand_instead_of_calls() -> None:
    """With tools left open and a response format, the output is a call or the format."""
    grammar = calls_grammar(FUNCTIONS, several=True, special_marks=False, answer=PERSON)
    assert accepts(grammar, '{"age": 3}')
    assert accepts(grammar, call("stay", {}))
    assert not accepts(grammar, "Hello")
