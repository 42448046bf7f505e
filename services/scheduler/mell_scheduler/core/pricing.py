"""How moves came out, each told once and with its cost: where a report is quicker than the news, that is waited for."""

from collections.abc import Iterable

from mell_scheduler.core.values import Command, MigrationPriced, MigrationSettled

NEWS_PATIENCE_US = 3_000_000
"""After a report that a move is done: its target tells what it cost once it has a token, a step later."""


class Pricing:
    """Between the core, which settles a move as soon as it may, and those who tell others what it cost."""

    def __init__(self, patience_us: int) -> None:
        self._patience_us = patience_us
        self._kept: dict[str, tuple[int, MigrationSettled]] = {}
        """By migration: until when, and what is told then."""

    @property
    def waits(self) -> bool:
        """Whether anything is kept."""
        return bool(self._kept)

    def take(self, commands: Iterable[Command], now_us: int) -> list[Command]:
        """Return what is to be carried out now; outcomes whose cost may still come are kept."""
        told: list[Command] = [settled for until_us, settled in self._kept.values() if until_us <= now_us]
        for command in commands:
            match command:
                case MigrationSettled() if command.unpriced:
                    self._kept[command.migration] = now_us + self._patience_us, command
                case MigrationPriced(settled):
                    # Told without its cost before, if the news comes so late.
                    if self._kept.get(settled.migration, (0, settled))[0] > now_us:
                        told.append(settled)
                        del self._kept[settled.migration]
                case _:
                    told.append(command)
        self._kept = {name: kept for name, kept in self._kept.items() if kept[0] > now_us}
        return told

    def end(self) -> list[Command]:
        """Return what is kept: nobody here hears of it any more."""
        kept, self._kept = self._kept, {}
        return [settled for _, settled in kept.values()]
