"""Watches Mell's events and says what is missing. Needs nats-py only.

    python examples/watch_events.py [--last-hour] [--nats nats://user:password@host:4222]

Each source (a scheduler or a frontend, one life of a process) numbers its events from 1. A hole in the numbers is a
loss: the source's queue was full, or the stream had dropped what was not read in time. The source's next `*.state`
event then says how things stand. An event may come twice; its number says so.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

import nats

PREFIX = os.environ.get("MELL_SUBJECT_PREFIX", "mell")
STREAM = "MELL" if PREFIX == "mell" else f"MELL-{PREFIX}"


class Sources:
    """What was the last number of each source."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def judge(self, source: str, number: int) -> str:
        """Return `ok`, `again`, or how many events of the source are missing before this one."""
        last = self._last.get(source)
        if last is not None and number <= last:
            return "again"
        self._last[source] = number
        missing = 0 if last is None else number - last - 1
        return f"{missing} missing" if missing else "ok"


async def messages(url: str, since: datetime | None) -> AsyncIterator[Msg]:
    """Yield the events from a time on, or only new ones, for ever."""
    # The broker's permissions give this role an inbox of its own.
    connection = await nats.connect(url, inbox_prefix="_INBOX.events", max_reconnect_attempts=-1)
    policy = DeliverPolicy.NEW if since is None else DeliverPolicy.BY_START_TIME
    config = ConsumerConfig(
        deliver_policy=policy,
        opt_start_time=None if since is None else since.isoformat(),
        ack_policy=AckPolicy.NONE,
    )
    subscription = await connection.jetstream().pull_subscribe(f"{PREFIX}.events.>", stream=STREAM, config=config)
    while True:
        try:
            for message in await subscription.fetch(100, timeout=5):
                yield message
        except TimeoutError:
            continue  # nothing new


def line(event: dict[str, Any], verdict: str) -> str:
    """Return an event in one line, what is missing before it in another."""
    shown = f"{event['time']} {event['type']} {event.get('subject', '')} {json.dumps(event['data'])}"
    if verdict == "ok":
        return shown
    return f"!! {event['source']}: {verdict} before number {event['sequence']}\n{shown}"


async def watch(url: str, since: datetime | None) -> None:
    """Print every event once."""
    sources = Sources()
    async for message in messages(url, since):
        event = json.loads(message.data)
        verdict = sources.judge(event["source"], int(event["sequence"]))
        if verdict != "again":
            print(line(event, verdict), flush=True)


def main(arguments: list[str]) -> None:
    """Read the command line and watch until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Watch Mell's events.")
    parser.add_argument("--nats", default=os.environ.get("NATS_URL", "nats://127.0.0.1:4222"), help="the broker")
    parser.add_argument("--last-hour", action="store_true", help="begin with the events of the last hour")
    asked = parser.parse_args(arguments)
    since = datetime.now(UTC) - timedelta(hours=1) if asked.last_hour else None
    try:
        asyncio.run(watch(asked.nats, since))
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main(sys.argv[1:])
