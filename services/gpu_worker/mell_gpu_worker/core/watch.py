"""The watch over frontends: what each is asked every second, what its answers mean, when it counts as gone."""

from mell_gpu_worker.core.commands import AskStatus, Command
from mell_gpu_worker.core.events import StatusAnswered
from mell_gpu_worker.core.residents import Residents


class FrontendWatch:
    """Asks statuses and acts on the answers. While our own connection is down nobody is asked, nobody is silent."""

    def __init__(self, residents: Residents) -> None:
        self._residents = residents
        self._streams = residents.streams
        self._connected = True

    def ask(self) -> list[Command]:
        """Ask every frontend that is not being asked already."""
        said: list[Command] = []
        for frontend in self._streams.unasked():
            self._streams.asked(frontend)
            said.append(AskStatus(frontend, self._streams.status(frontend)))
        return said

    def round(self, now_us: int) -> list[Command]:
        """Drop what is over or belongs to silent frontends, ask the others."""
        self._streams.purge(now_us)
        if not self._connected:
            return []
        said = [command for row in self._streams.silent(now_us) for command in self._residents.give_up(row, now_us)]
        return said + self.ask()

    def take(self, event: StatusAnswered, now_us: int) -> list[Command]:
        """Resend, stop, forget, as a frontend answers; rows are matched by key, for they may be out of date."""
        self._streams.answered(event.frontend, now_us, heard=True)
        keys = zip(event.status.sequences, event.status.generations, strict=True)
        known = {row: self._streams.find(*key) for row, key in enumerate(keys)}
        said: list[Command] = []
        for row, first_index in event.reply.resend.items():
            sequence = known.get(row)
            if sequence is not None:
                said += self._residents.send_again(sequence, first_index)
        for row in event.reply.cancel:
            sequence = known.pop(row, None)
            if sequence is not None:
                said += self._residents.give_up(sequence, now_us)
        for row in event.reply.ack_end:
            sequence = known.pop(row, None)
            if sequence is not None and not sequence.live:
                self._streams.forget(sequence, now_us)
        return said

    def miss(self, frontend: str, now_us: int) -> None:
        """A frontend did not answer."""
        self._streams.answered(frontend, now_us, heard=False)

    def disconnect(self) -> None:
        """Our connection is down."""
        self._connected = False

    def reconnect(self, now_us: int) -> list[Command]:
        """Our connection is up again: silence starts anew, and everybody is asked at once."""
        self._connected = True
        self.stood_still(now_us)
        return self.ask()

    def stood_still(self, now_us: int) -> None:
        """Nobody could be heard: silence starts anew."""
        self._streams.hear_all(now_us)
