"""`POST /v1/chat/completions`: messages, tools, and what is to be returned of them."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from mell_frontend.schema.base import ApiModel, Name, TokenCount
from mell_frontend.schema.sampling import SamplingRequest


class TextPart(ApiModel):
    """A piece of a message's text; the only kind of part that is served."""

    type: Literal["text"]
    text: str


def _content(value: Any) -> Any:
    """Say which part is no text, instead of what each member of a union thinks of it."""
    for position, part in enumerate(value if isinstance(value, list) else []):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"part {position} is of type {kind[:40]!r}, but this server reads text only")
    return value


def _kind_of_content(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    return "parts" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("parts")],
    Discriminator(
        _kind_of_content,
        custom_error_type="content",
        custom_error_message="content must be a string or a list of text parts",
    ),
]


class FunctionCall(ApiModel):
    """A function the assistant called: its name, and its arguments as JSON text."""

    name: str = Field(min_length=1, max_length=200)
    arguments: str = "{}"


class ToolCall(ApiModel):
    """One call in an assistant's earlier message."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class MessageBase(ApiModel):
    """What messages of every role may hold."""

    name: str | None = None


class _WithContent(MessageBase):
    content: Content

    _check_content = field_validator("content", mode="before")(_content)


class SystemMessage(_WithContent):
    """Instructions from whoever runs the application."""

    role: Literal["system"]


class DeveloperMessage(_WithContent):
    """The newer name of a system message."""

    role: Literal["developer"]


class UserMessage(_WithContent):
    """What the user says."""

    role: Literal["user"]


class AssistantMessage(MessageBase):
    """What the model said earlier, and the functions it called."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] = []
    reasoning_content: str | None = None
    refusal: str | None = None

    _check_content = field_validator("content", mode="before")(_content)


class ToolMessage(_WithContent):
    """What a function that the assistant called gave back."""

    role: Literal["tool"]
    tool_call_id: str = ""


ChatMessage = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class FunctionDefinition(ApiModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Name
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False


class Tool(ApiModel):
    """A tool that the model may use; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(ApiModel):
    """The function of a named tool choice."""

    name: str


class NamedToolChoice(ApiModel):
    """The model must call this function."""

    type: Literal["function"]
    function: NamedFunction


def _kind_of_choice(value: Any) -> str:
    return "word" if isinstance(value, str) else "named"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")] | Annotated[NamedToolChoice, Tag("named")],
    Discriminator(_kind_of_choice),
]


class ChatCompletionRequest(SamplingRequest):
    """A conversation to go on with."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: TokenCount | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    add_generation_prompt: bool = True
    modalities: list[Literal["text"]] = ["text"]

    reasoning_effort: Any = None

    @property
    def output_limit(self) -> int | None:
        """The output limit in tokens; the newer name wins."""
        return self.max_completion_tokens or self.max_tokens
