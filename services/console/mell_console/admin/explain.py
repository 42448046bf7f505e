"""`mell explain`: every placement and move of a request, why, and what it cost."""

from pydantic import TypeAdapter
from rich.markup import escape
from rich.table import Table

from mell_console.admin.ask import DONE, Frontend, console, print_json, segment
from mell_console.admin.words import cost, span
from mell_shared.messages.admin import Explanation, Happening, Story

_EXPLANATION: TypeAdapter[Explanation] = TypeAdapter(Explanation)
_STYLES = {"moved": "green", "stayed": "red", "gone": "dim"}


def explain(frontend: Frontend, request: str, *, as_json: bool) -> int:
    """Show the story of each of a request's sequences."""
    reply = frontend.get(f"requests/{segment(request)}", _EXPLANATION)
    if as_json:
        print_json(reply)
        return DONE
    out = console()
    for number, story in enumerate(reply.stories):
        out.print(*([""] if number else []), headline(story), sep="\n", soft_wrap=True)
        out.print(story_table(story))
    return DONE


def headline(story: Story) -> str:
    """Return in one line which sequence it is, and where."""
    called = f" ({story.request_id})" if story.request_id else ""
    where = f" on {story.worker}, {story.tokens} tokens, {story.blocks} KV blocks" if story.worker else ""
    if story.state == "waiting":
        where = f" for {span(story.waited_s)}, {story.position} of {story.model} before it"
    return f"[bold]{escape(story.sequence)}[/bold]{escape(f'{called}: {story.state}{where}')}"


def story_table(story: Story) -> Table:
    """Return a row for each thing that happened, the first first."""
    table = Table("ago", "", "worker", "generation", "why", "cost", box=None)
    for position, happening in enumerate(story.happenings):
        if position == 1 and story.left_out:
            table.add_row("", "...", "", "", f"{story.left_out} more are no longer remembered", "")
        style = _STYLES.get(happening.what, "")
        what = f"[{style}]{happening.what}[/{style}]" if style else happening.what
        table.add_row(
            span(happening.ago_s),
            what,
            escape(_where(happening)),
            str(happening.generation),
            escape(happening.why),
            _cost(happening),
        )
    return table


def _where(happening: Happening) -> str:
    move = happening.move
    return f"{move.source} -> {move.target}" if move else happening.worker


def _cost(happening: Happening) -> str:
    move = happening.move
    if move is not None:
        return f"{move.mode}, {cost(move)}" if happening.what != "moving" or move.outcome == "moving" else move.mode
    if happening.what != "placed":
        return ""
    waited = f" after {span(happening.waited_s)}" if happening.generation == 1 and happening.waited_s >= 0.001 else ""
    return f"{happening.blocks} blocks of {happening.free_blocks} free{waited}"
