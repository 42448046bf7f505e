"""How the tokens of one sequence are chosen; the whole state of sampling besides the ids themselves."""

from typing import Annotated, Literal

from pydantic import Field

from mell_shared.messages.base import Message, Uint32

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: end token or stop id; `length`: output limit or context; `error`: the engine could not go on."""


class Grammar(Message):
    """A constraint on the output in llguidance's own form; its state is a replay of the output ids."""

    text: str


class SamplingParams(Message):
    """Parameters of one sequence, defaults as in the OpenAI API (`top_k` 0 and `min_p` 0 mean off).

    Random numbers come from a counter generator keyed by (seed, choice) with the output index as counter,
    so that sampling resumes anywhere from the ids alone.
    """

    max_tokens: int | None = Field(default=None, ge=1)
    """Output limit in tokens; None: until the context or the worker's memory is full."""
    min_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    logit_bias: dict[Uint32, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: int = Field(ge=0, lt=2**63)
    choice: Uint32 = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[Uint32, ...] = ()
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """None: none; 0: the chosen token's; k: also the k most likely alternatives'."""
    grammar: Grammar | None = None
