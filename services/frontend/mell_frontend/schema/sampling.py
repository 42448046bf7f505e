"""The parameters that chat and legacy completions share."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from mell_frontend.schema.base import ApiModel, TokenCount, TokenId


def _int_keys(value: Any) -> Any:
    """Turn JSON's text keys into token ids; anything else is left for pydantic to refuse."""
    if not isinstance(value, dict):
        return value
    for key in value:
        if isinstance(key, str) and not re.fullmatch(r"[0-9]{1,10}", key):
            raise ValueError(f"keys must be token ids, got {key[:40]!r}")
    return {int(key): bias for key, bias in value.items()}


LogitBias = Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_int_keys)]


def _kind_of_stop(value: Any) -> str:
    return "list" if isinstance(value, list) else "text"


_StopText = Annotated[str, Field(min_length=1)]
Stop = Annotated[
    Annotated[_StopText, Tag("text")] | Annotated[list[_StopText], Tag("list")], Discriminator(_kind_of_stop)
]


class StreamOptions(ApiModel):
    """What a stream carries besides its text."""

    include_usage: bool = False


class JsonSchema(ApiModel):
    """A named JSON schema that the output must fit."""

    name: str = Field("response", max_length=64)
    description: str = ""
    schema_: dict[str, Any] | bool = Field(True, alias="schema")
    strict: bool = False


class ResponseFormat(ApiModel):
    """The form of the output."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class SamplingRequest(ApiModel):
    """How to sample, how long, and how the answer is sent; the same for both kinds of completion.

    Ranges are OpenAI's where it has the parameter, else vLLM's. `user` and its like are accepted without effect.
    """

    model: str = Field(min_length=1, max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, lt=2**31)] = 1
    max_tokens: TokenCount | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    logit_bias: LogitBias = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=128)
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0

    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None

    @property
    def output_limit(self) -> int | None:
        """The output limit in tokens."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that says what was used."""
        return self.stream_options is not None and self.stream_options.include_usage
