"""What an engine behind a worker declares of itself: what the core may ask of it, and what it must do without."""

from dataclasses import dataclass
from typing import Literal

from mell_shared.messages.sampling import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Each default is what an engine of ours can do.

    `blocks`: whether the core's block tables are the engine's memory, or an estimate of memory that somebody else
    manages; then the engine's `measure` corrects it. `chunked_prefill`: prompts come in chunks of the token budget;
    else a whole prompt is one row. `prefix_cache`: equal beginnings are computed once. `grammars`: followed after any
    output, or only from an output's first token on. `seeded_sameness`: equal ids and parameters give equal tokens,
    wherever they run. `kv`: in moves by `kv` the source's worker sends blocks, or only ids go, and the target's engine
    fetches from the source's what it finds there. `own_pace`: sequences go on between steps; rows may be left pending,
    and the engine is told to rest when nobody runs any more.
    """

    blocks: Literal["known", "estimated"] = "known"
    chunked_prefill: bool = True
    prefix_cache: bool = True
    logprobs: bool = True
    grammars: Literal["anywhere", "from_the_start", "none"] = "anywhere"
    seeded_sameness: bool = True
    kv: Literal["sent", "fetched"] = "sent"
    own_pace: bool = False

    def fault(self, sampling: SamplingParams, outputs: int) -> str | None:
        """Return why an engine like this cannot go on with a sequence after so many outputs, or None."""
        if sampling.logprobs is not None and not self.logprobs:
            return "log-probabilities are not to be had from this worker's engine"
        if sampling.grammar is None or self.grammars == "anywhere":
            return None
        if self.grammars == "none":
            return "structured output is not to be had from this worker's engine"
        if outputs:
            return "this worker's engine begins structured output anew, it cannot go on after what is there already"
        return None
