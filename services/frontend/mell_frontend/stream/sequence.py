"""The record of one open sequence: where it stands, who owns it, what was accepted from it."""

from dataclasses import dataclass, field

from mell_frontend.generation import SequenceRequest
from mell_frontend.stream.states import OWNED, Cause, State, next_state
from mell_shared.messages.frontend import Claim, Granted
from mell_shared.messages.scheduler import PlaceRequest
from mell_shared.messages.worker import Cancel, Resend, Submit


@dataclass(slots=True)
class Sequence:
    """One sequence from opening to end. Only the core changes it.

    `owner` is set in the states of `OWNED` alone. Within one generation there is at most one owner: whatever
    takes a sequence from an owner raises the generation first.
    """

    request: SequenceRequest
    opened_us: int
    output_limit: int
    state: State = State.PLACING
    generation: int = 1
    owner: str | None = None
    output_ids: list[int] = field(default_factory=list)
    """All accepted tokens; never taken back."""
    cached_tokens: int = 0

    ask: int = 0
    """Number of the outstanding `AskPlacement` or `SubmitSequence`; answers to any other are late."""
    asked_us: int = 0
    excluded: tuple[str, ...] = ()
    """Workers that refused or lost it just now; forgotten once the scheduler says to wait."""
    unanswered_since_us: int | None = None
    """Since when the scheduler gives no answer that helps."""
    pauses: int = 0
    retry_at_us: int = 0
    setbacks: int = 0
    """Submissions in a row that came to nothing: no token was accepted since."""

    progressed_us: int = 0
    resend_asked_us: int | None = None
    resends: int = 0
    """Resends asked for since the last token was accepted, or the owner changed."""
    missing_since_us: int | None = None
    """When the first of its owner's statuses came that lacks it."""
    granted: tuple[Claim, Granted] | None = None
    """The claim that made the present owner, with the reply that a repeat gets too."""
    aborted: set[str] = field(default_factory=set)
    """Migrations of this generation that must not be granted any more."""
    evicted: tuple[str, int] | None = None
    """Worker and generation of the last eviction taken; a repeat gets the same reply."""

    @property
    def name(self) -> str:
        """The sequence's id."""
        return self.request.sequence

    @property
    def accepted(self) -> int:
        """How many output tokens were accepted; also the index of the next."""
        return len(self.output_ids)

    @property
    def full(self) -> bool:
        """Whether no more output is allowed."""
        return self.accepted >= self.output_limit

    def move(self, cause: Cause) -> None:
        """Change the state as the table says."""
        self.state = next_state(self.state, cause)

    def raise_generation(self) -> None:
        """Begin a new generation: whatever was agreed or noticed in the old one is void."""
        self.generation += 1
        self.granted = None
        self.aborted.clear()
        self.missing_since_us = None
        self.resend_asked_us = None
        self.resends = 0

    def place_request(self, frontend: str, now_us: int) -> PlaceRequest:
        """Return what the scheduler needs to know."""
        sampling = self.request.sampling
        remaining = None if sampling.max_tokens is None else sampling.max_tokens - self.accepted
        return PlaceRequest(
            sequence=self.name,
            generation=self.generation,
            frontend=frontend,
            model=self.request.model,
            prompt_tokens=len(self.request.prompt_ids) + self.accepted,
            max_output_tokens=remaining,
            priority=self.request.priority,
            waited_s=(now_us - self.opened_us) / 1e6,
            excluded=self.excluded,
            request_id=self.request.request_id,
        )

    def submit(self, frontend: str) -> Submit:
        """Return what a worker needs to go on after the accepted tokens."""
        return Submit(
            sequence=self.name,
            generation=self.generation,
            frontend=frontend,
            model=self.request.model,
            prompt_ids=list(self.request.prompt_ids),
            output_ids=list(self.output_ids),
            sampling=self.request.sampling,
            priority=self.request.priority,
        )

    def resend(self) -> Resend:
        """Return the wish for all tokens from the next index on."""
        return Resend(sequence=self.name, generation=self.generation, first_index=self.accepted)

    def cancel(self) -> Cancel:
        """Return the order to stop this generation."""
        return Cancel(sequence=self.name, generation=self.generation)

    def check(self) -> None:
        """Assert what must hold between events."""
        assert self.state is not State.ENDED, f"{self.name} has ended and is still open"
        assert (self.owner is not None) == (self.state in OWNED), f"{self.name} is {self.state} with {self.owner}"
        assert self.generation >= 1
        assert self.accepted <= self.output_limit, f"{self.name} has more output than its limit"
        assert self.granted is None or self.granted[1].generation == self.generation
        assert self.granted is None or self.granted[0].target == self.owner
