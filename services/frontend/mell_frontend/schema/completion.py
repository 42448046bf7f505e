"""`POST /v1/completions`: the legacy form, with text or token ids as prompt, one or several."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from mell_frontend.schema.base import TokenId
from mell_frontend.schema.sampling import SamplingRequest


def _kind_of_prompt(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, str):
        return "texts"
    return "id_lists" if isinstance(first, list) else "ids"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Tag("texts")]
    | Annotated[list[TokenId], Tag("ids"), Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Tag("id_lists")],
    Discriminator(_kind_of_prompt),
]


class CompletionRequest(SamplingRequest):
    """Text to go on with. `suffix` and a `best_of` above `n` are refused; `echo` repeats the prompt's text."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    suffix: str = ""
    best_of: int | None = None
    add_special_tokens: bool = True

    @property
    def several(self) -> bool:
        """Whether the prompt is a list of prompts."""
        return isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt, in order."""
        prompts: Any = self.prompt if self.several else [self.prompt]
        return list(prompts)
