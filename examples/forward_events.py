"""Forwards Mell's events to a webhook: in order, each at least once, none skipped. Needs nats-py only.

    python examples/forward_events.py https://example.org/hook [--nats nats://...]

The broker keeps the place in the stream, under the consumer's name (`--name`): stop this program, start it again
anywhere, and it goes on. Each event is one POST (CloudEvents, structured mode). Any answer but 2xx is tried again after
a pause that doubles, and the events behind it wait: order is kept. The receiver may get an event twice, and tells that
by (source, sequence). What waits longer than events are kept is lost; the numbers show it.
"""

import argparse
import asyncio
import os
import sys
import urllib.error
import urllib.request

from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

import nats

PREFIX = os.environ.get("MELL_SUBJECT_PREFIX", "mell")
STREAM = "MELL" if PREFIX == "mell" else f"MELL-{PREFIX}"
ACK_WAIT_S = 30.0
"""After this the broker takes a copy of this program for dead, and gives its event to the next."""
LONGEST_PAUSE_S = 15.0
POST_TIMEOUT_S = 10.0


def post(url: str, body: bytes) -> str:
    """Send one event; return what went wrong, empty if nothing did."""
    request = urllib.request.Request(url, body, {"content-type": "application/cloudevents+json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=POST_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        with error:
            return f"{url} answers {error.code}"
    except OSError as error:
        return f"{url} does not answer: {error}"


async def deliver(message: Msg, url: str, first_pause_s: float) -> None:
    """Send an event until it is taken, then let the broker forget it; when stopped, give it back."""
    try:
        await repeat(message, url, first_pause_s)
    except asyncio.CancelledError:
        await message.nak()
        raise
    await message.ack_sync()


async def repeat(message: Msg, url: str, pause_s: float) -> None:
    """Post until the receiver takes it."""
    while problem := await asyncio.to_thread(post, url, message.data):
        print(f"{problem}; again in {pause_s:g} s", file=sys.stderr, flush=True)
        await message.in_progress()  # else the broker would give it to another copy of this program
        await asyncio.sleep(pause_s)
        pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)


async def forward(url: str, hook: str, name: str, first_pause_s: float) -> None:
    """Forward for ever."""
    # The broker's permissions give this role an inbox of its own.
    connection = await nats.connect(url, inbox_prefix="_INBOX.events", max_reconnect_attempts=-1)
    config = ConsumerConfig(
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=ACK_WAIT_S,
        max_ack_pending=1,  # one at a time: this is what keeps the order
    )
    subscription = await connection.jetstream().pull_subscribe(
        f"{PREFIX}.events.>", durable=name, stream=STREAM, config=config
    )
    try:
        while True:
            try:
                (message,) = await subscription.fetch(1, timeout=5)
            except TimeoutError:
                continue  # nothing new
            await deliver(message, hook, first_pause_s)
    finally:
        await connection.close()


def main(arguments: list[str]) -> None:
    """Read the command line and forward until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Forward Mell's events to a webhook.")
    parser.add_argument("hook", help="where each event is posted to")
    parser.add_argument("--nats", default=os.environ.get("NATS_URL", "nats://127.0.0.1:4222"), help="the broker")
    parser.add_argument("--name", default="webhook", help="the consumer's name at the broker")
    parser.add_argument("--first-pause", type=float, default=1.0, help="seconds before the first repeat")
    asked = parser.parse_args(arguments)
    try:
        asyncio.run(forward(asked.nats, asked.hook, asked.name, asked.first_pause))
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main(sys.argv[1:])
