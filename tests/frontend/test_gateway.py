import asyncio
from collections.abc import Awaitable, Callable

import pytest

from mell_frontend.generation import Delta, GenerationError, Waiting
from mell_frontend.stream.limits import StreamLimits
from mell_shared.codec import decode, encode
from mell_shared.messages.admin import StatusRequest
from mell_shared.messages.base import Message
from mell_shared.messages.frontend import FRONTEND_REPLY, ControlInvalid, Evicted, EvictionTaken, TokensGenerated
from mell_shared.messages.scheduler import Placed, Queued, Rejected
from mell_shared.messages.worker import Cancel, CancelDone, Resend, Submit, SubmitAccepted, SubmitRefused
from mell_shared.testing import run_virtually
from tests.frontend.peers import SUBJECTS, Cluster, read, read_to_end, request, text


async def failure(stream_next: Awaitable[Waiting | Delta]) -> GenerationError:
    """Return the error that a stream's `next` raises."""
    with pytest.raises(GenerationError) as caught:
        await stream_next
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    """Let virtual time pass until `condition` holds."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to that")


def test_a_sequence_is_placed_submitted_and_streamed_to_its_end() -> None:
    """Every token once and in order, then the finish reason; the worker may forget it afterwards."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            stream = cluster.gateway.open(request())
            token_ids, came = await read(stream)
            assert token_ids == text((1, 2, 3), 20)
            last = came[-1]
            assert isinstance(last, Delta)
            assert (last.finish_reason, last.cached_tokens) == ("length", 1)
            assert cluster.gateway.open_streams == 0
            await until(lambda: not cluster.workers["w1"].running)

    run_virtually(scenario())


def test_a_reader_is_given_all_that_came_since_it_last_looked() -> None:
    """A slow reader gets one large delta, not many small ones."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            stream = cluster.gateway.open(request())
            await asyncio.sleep(10)
            assert await stream.next() == Delta(text((1, 2, 3), 20), [], "length", 1)

    run_virtually(scenario())


def test_a_stream_that_waits_says_so_every_second() -> None:
    """A reader that waits for its first token, however long, is never left without a word."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            cluster.workers["w1"].step_s = 3.5
            await asyncio.sleep(0.01)
            started_s = cluster.loop.time()
            stream = cluster.gateway.open(request(max_tokens=2))
            while isinstance(await stream.next(), Waiting):
                assert cluster.loop.time() - started_s <= 1.1
                started_s = cluster.loop.time()
            assert isinstance(await stream.next(), Delta)

    run_virtually(scenario())


def test_a_queued_stream_shows_its_position() -> None:
    """Then it is placed and runs."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            answers = [Queued(position=3), Queued(position=1), Placed(worker="w1")]
            cluster.scheduler.decide = lambda asked: answers[min(len(cluster.scheduler.asked), 3) - 1]
            token_ids, came = await read(cluster.gateway.open(request()))
            assert token_ids == text((1, 2, 3), 20)
            assert came[:2] == [Waiting(3), Waiting(1)]

    run_virtually(scenario())


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Rejected(reason="queue_full", message="full", retry_after_s=3), "queue_full"),
        (Rejected(reason="no_worker", message="none"), "unavailable"),
        (Rejected(reason="too_large", message="large", limit_tokens=64), "too_large"),
        (Rejected(reason="unknown_model", message="what"), "unknown_model"),
    ],
)
def test_a_rejected_stream_raises_what_the_scheduler_said(reply: Rejected, kind: str) -> None:
    """Kind, message, time to retry and limit; also when `next` is called again."""

    async def scenario() -> None:
        async with Cluster() as cluster:
            cluster.scheduler.decide = lambda asked: reply
            stream = cluster.gateway.open(request())
            for _ in range(2):
                error = await failure(stream.next())
                assert (error.kind, error.message) == (kind, reply.message)
                assert (error.retry_after_s, error.limit_tokens) == (reply.retry_after_s, reply.limit_tokens)
            assert cluster.gateway.open_streams == 0

    run_virtually(scenario())


def test_a_scheduler_that_never_answers_makes_streams_unavailable() -> None:
    """After the deadline; until then the reader is told to wait."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            cluster.scheduler.decide = lambda asked: None
            stream = cluster.gateway.open(request())
            came: list[Waiting | Delta] = []
            with pytest.raises(GenerationError) as caught:
                await read(stream, came=came)
            assert caught.value.kind == "unavailable"
            assert came[:10] == [Waiting(0)] * 10
            assert 14 <= cluster.loop.time() <= 18

    run_virtually(scenario())


def test_no_scheduler_at_all_is_found_out_and_ready_says_no() -> None:
    """Nobody listens for placements; a scheduler that comes in time saves the stream."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            await until(lambda: cluster.gateway.ready)
            cluster.scheduler._bus.disconnect()
            stream = cluster.gateway.open(request())
            await until(lambda: not cluster.gateway.ready)
            assert (await failure(cluster.gateway.admin(StatusRequest()))).kind == "unavailable"
            cluster.scheduler._bus.reconnect()
            assert await read_to_end(stream) == text((1, 2, 3), 20)
            assert cluster.gateway.ready
            assert (await cluster.gateway.admin(StatusRequest())).policy == "p"  # type: ignore[union-attr]

    run_virtually(scenario())


def test_a_worker_without_room_is_passed_over() -> None:
    """Its refusal leads to the next worker."""

    async def scenario() -> None:
        async with Cluster("full", "w2") as cluster:
            refusal = SubmitRefused(reason="no_room", message="")
            cluster.workers["full"].answer = lambda command, reply: refusal
            assert await read_to_end(cluster.gateway.open(request())) == text((1, 2, 3), 20)
            assert [asked.excluded for asked in cluster.scheduler.asked] == [(), ("full",)]

    run_virtually(scenario())


def test_a_worker_that_says_the_request_is_bad_fails_the_stream() -> None:
    """Nobody else is asked."""

    async def scenario() -> None:
        async with Cluster("w1", "w2") as cluster:
            refusal = SubmitRefused(reason="bad_request", message="the grammar has no way on")
            cluster.workers["w1"].answer = lambda command, reply: refusal
            error = await failure(cluster.gateway.open(request()).next())
            assert (error.kind, error.message) == ("refused", "the grammar has no way on")
            assert not cluster.workers["w2"].commands

    run_virtually(scenario())


def test_tokens_prove_that_a_submission_was_taken() -> None:
    """Its reply was lost, but what it makes arrives: no other worker is asked."""

    async def scenario() -> None:
        async with Cluster("w1", "w2") as cluster:
            cluster.workers["w1"].answer = lambda command, reply: None if isinstance(command, Submit) else reply
            assert await read_to_end(cluster.gateway.open(request(max_tokens=600))) == text((1, 2, 3), 600)
            assert not cluster.workers["w2"].commands

    run_virtually(scenario())


def test_a_submission_that_is_never_heard_of_goes_elsewhere_and_is_stopped() -> None:
    """The worker ran it after all; its tokens, of an old generation, never reach the reader."""

    async def scenario() -> None:
        async with Cluster("w1", "w2") as cluster:
            deaf = cluster.workers["w1"]
            deaf.answer = lambda command, reply: None if isinstance(command, Submit) else reply
            deaf.lose_tokens = lambda message: True
            deaf.tells_status = False
            stream = cluster.gateway.open(request(max_tokens=50))
            assert await read_to_end(stream) == text((1, 2, 3), 50)
            stopped = [command for command in deaf.commands if isinstance(command, Cancel)]
            assert [(cancel.sequence, cancel.generation) for cancel in stopped] == [("s", 1)]
            assert not deaf.running

    run_virtually(scenario())


def test_lost_tokens_are_asked_for_and_nothing_is_missing() -> None:
    """A gap leads to a resend at once."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            worker = cluster.workers["w1"]
            dropped = []

            def lose(message: TokensGenerated) -> bool:
                lost = message.first_indices[0] in {0, 4, 5, 11} and message.first_indices[0] not in dropped
                dropped.extend(message.first_indices if lost else [])
                return lost

            worker.lose_tokens = lose
            assert await read_to_end(cluster.gateway.open(request())) == text((1, 2, 3), 20)
            assert dropped == [0, 4, 5, 11]
            assert [command.first_index for command in worker.commands if isinstance(command, Resend)] == [0, 4, 11]

    run_virtually(scenario())


def test_a_lost_end_is_found_by_the_status() -> None:
    """Nothing follows the last tokens that could show a gap; the worker's status does."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            lost = []

            def lose_once(message: TokensGenerated) -> bool:
                if message.finished and not lost:
                    lost.append(message)
                    return True
                return False

            cluster.workers["w1"].lose_tokens = lose_once
            assert await read_to_end(cluster.gateway.open(request())) == text((1, 2, 3), 20)
            assert lost
            await until(lambda: not cluster.workers["w1"].running)

    run_virtually(scenario())


def test_a_silent_worker_is_replaced_and_the_text_goes_on_exactly() -> None:
    """What it had delivered stays; when it speaks again it is stopped and nothing of it counts."""

    async def scenario() -> None:
        async with Cluster("w1", "w2") as cluster:
            stream = cluster.gateway.open(request(max_tokens=300))
            begun, _ = await read(stream, at_least=5)
            cluster.workers["w1"].silent = True
            middle, _ = await read(stream, at_least=10)
            submit = cluster.workers["w2"].running["s"].submit
            assert submit.output_ids == text((1, 2, 3), len(submit.output_ids))
            assert submit.generation == 2
            cluster.workers["w1"].silent = False
            assert begun + middle + await read_to_end(stream) == text((1, 2, 3), 300)
            await until(lambda: "s" not in cluster.workers["w1"].running)

    run_virtually(scenario())


def test_a_worker_that_nobody_hears_is_replaced_sooner() -> None:
    """Its process is gone: the broker says that nobody listens, well before the silence is long enough."""

    async def scenario() -> None:
        async with Cluster("w1", "w2") as cluster:
            stream = cluster.gateway.open(request(max_tokens=100))
            begun, _ = await read(stream, at_least=5)
            gone_s = cluster.loop.time()
            cluster.workers["w1"].silent = True
            cluster.workers["w1"].bus.disconnect()
            cluster.scheduler.workers.remove("w1")
            middle, _ = await read(stream, at_least=1)
            assert cluster.loop.time() - gone_s < 3.0
            assert begun + middle + await read_to_end(stream) == text((1, 2, 3), 100)

    run_virtually(scenario())


def test_a_stream_outlives_its_only_worker_if_another_comes() -> None:
    """A stream that was admitted waits for the replacement."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            stream = cluster.gateway.open(request(max_tokens=100))
            begun, _ = await read(stream, at_least=5)
            cluster.workers["w1"].silent = True
            cluster.workers["w1"].bus.disconnect()
            cluster.scheduler.workers.clear()
            reading = asyncio.create_task(read_to_end(stream))
            await asyncio.sleep(10)
            await cluster.add_worker("w2")
            assert begun + await reading == text((1, 2, 3), 100)

    run_virtually(scenario())


def test_a_worker_that_forgot_a_sequence_loses_it() -> None:
    """Two statuses without it are enough."""

    async def scenario() -> None:
        async with Cluster("w1", "w2") as cluster:
            stream = cluster.gateway.open(request(max_tokens=100))
            begun, _ = await read(stream, at_least=5)
            cluster.workers["w1"].running.clear()
            assert begun + await read_to_end(stream) == text((1, 2, 3), 100)
            assert cluster.workers["w2"].commands

    run_virtually(scenario())


def test_an_evicted_sequence_goes_on_elsewhere() -> None:
    """With the tokens that only the eviction brought."""

    async def scenario() -> None:
        async with Cluster("w1", "w2") as cluster:
            stream = cluster.gateway.open(request(max_tokens=40))
            begun, _ = await read(stream, at_least=5)
            running = cluster.workers["w1"].running.pop("s")
            running.output_ids += text((1, 2, 3), 40)[len(running.output_ids) :][:7]
            eviction = Evicted(worker="w1", sequence="s", generation=1, output_ids=running.output_ids)
            assert await cluster.workers["w1"].ask(eviction) == EvictionTaken()
            assert begun + await read_to_end(stream) == text((1, 2, 3), 40)
            assert cluster.workers["w2"].commands[0].output_ids == running.output_ids  # type: ignore[attr-defined]

    run_virtually(scenario())


def test_closing_a_stream_cancels_it_on_its_worker_at_once() -> None:
    """And closing again, or after its end, does nothing."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            stream = cluster.gateway.open(request())
            await read(stream, at_least=3)
            stream.close()
            stream.close()
            assert cluster.gateway.open_streams == 0
            await asyncio.sleep(0.001)
            assert not cluster.workers["w1"].running
            ended = cluster.gateway.open(request("ended"))
            await read_to_end(ended)
            ended.close()
            await asyncio.sleep(5)
            assert len([command for command in cluster.workers["w1"].commands if isinstance(command, Cancel)]) == 1

    run_virtually(scenario())


def test_a_cancel_without_answer_is_repeated() -> None:
    """Until the worker confirms."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            worker = cluster.workers["w1"]
            stream = cluster.gateway.open(request(max_tokens=1000))
            await read(stream, at_least=3)
            worker.silent = True
            stream.close()
            await until(lambda: len(worker.commands) >= 3)
            worker.silent = False
            await until(lambda: not worker.running)
            cancels = [command for command in worker.commands if isinstance(command, Cancel)]
            assert len(cancels) >= 2
            await asyncio.sleep(10)
            assert len([command for command in worker.commands if isinstance(command, Cancel)]) <= len(cancels) + 1

    run_virtually(scenario())


def test_streams_go_on_after_our_own_reconnection() -> None:
    """What came meanwhile is lost and sent again; the worker, which we could not hear, is not blamed."""

    async def scenario() -> None:
        async with Cluster("w1", "w2") as cluster:
            stream = cluster.gateway.open(request(max_tokens=200))
            begun, _ = await read(stream, at_least=5)
            cluster.bus.disconnect()
            await asyncio.sleep(8)
            assert not cluster.gateway.ready
            cluster.bus.reconnect()
            assert begun + await read_to_end(stream) == text((1, 2, 3), 200)
            assert not cluster.workers["w2"].commands

    run_virtually(scenario())


def test_streams_fail_when_the_broker_stays_away() -> None:
    """Nothing hangs for ever."""

    async def scenario() -> None:
        async with Cluster("w1", limits=StreamLimits(broker_lost_us=20_000_000)) as cluster:
            running = cluster.gateway.open(request(max_tokens=10_000))
            await read(running, at_least=5)
            cluster.workers["w1"].silent = True
            cluster.bus.disconnect()
            placing = cluster.gateway.open(request("late"))
            with pytest.raises(GenerationError) as caught:
                await read_to_end(running)
            assert caught.value.kind == "unavailable"
            with pytest.raises(GenerationError) as caught:
                await read_to_end(placing)
            assert caught.value.kind == "unavailable"

    run_virtually(scenario())


def test_what_cannot_be_read_is_dropped_counted_and_answered() -> None:
    """Garbage on either subject and garbage in a reply; the stream beside it is untouched."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            worker = cluster.workers["w1"]
            stream = cluster.gateway.open(request())
            for garbage in (b"", b"\xc1", b"\x81\xa4kind\xa6tokens", bytes(100_000)):
                await worker.bus.publish(SUBJECTS.frontend_tokens("f"), garbage)
                reply = await worker.bus.request(SUBJECTS.frontend_control("f"), garbage, 1.0)
                assert isinstance(decode(FRONTEND_REPLY, reply), ControlInvalid)
                await worker.bus.publish(SUBJECTS.frontend_control("f"), garbage)
            await until(lambda: cluster.gateway.counts["messages_invalid"] == 12)
            assert await read_to_end(stream) == text((1, 2, 3), 20)

    run_virtually(scenario())


def test_replies_that_make_no_sense_are_as_good_as_none() -> None:
    """Of the wrong kind or unreadable: the sequence goes elsewhere."""

    async def scenario() -> None:
        async with Cluster("w1", "w2") as cluster:
            wrong: dict[type[Message], Message] = {Submit: CancelDone(), Cancel: SubmitAccepted()}
            cluster.workers["w1"].answer = lambda command, reply: wrong.get(type(command), reply)
            cluster.workers["w1"].step_s = 60.0
            assert await read_to_end(cluster.gateway.open(request())) == text((1, 2, 3), 20)
            answers = iter([Queued(position=0).model_copy(update={"kind": "nonsense"}), Placed(worker="w2")])
            cluster.scheduler.decide = lambda asked: next(answers)
            assert await read_to_end(cluster.gateway.open(request("again"))) == text((1, 2, 3), 20)
            assert cluster.gateway.counts["replies_invalid"] == 1

    run_virtually(scenario())


def test_a_worker_id_that_is_no_subject_is_harmless() -> None:
    """A scheduler that names nonsense costs a placement."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            answers = iter([Placed(worker="no.such *"), Placed(worker="w1")])
            cluster.scheduler.decide = lambda asked: next(answers)
            assert await read_to_end(cluster.gateway.open(request())) == text((1, 2, 3), 20)

    run_virtually(scenario())


def test_a_prompt_over_the_brokers_limit_is_too_large() -> None:
    """The reader is told how many tokens would about fit, and that many do."""

    async def scenario() -> None:
        async with Cluster("w1", max_payload=4096) as cluster:
            error = await failure(cluster.gateway.open(request(prompt=(1,) * 2000)).next())
            assert error.kind == "too_large"
            assert error.limit_tokens is not None
            fitting = (1,) * error.limit_tokens
            stream = cluster.gateway.open(request("f", prompt=fitting, max_tokens=1))
            assert await read_to_end(stream) == text(fitting, 1)

    run_virtually(scenario())


def test_a_draining_gateway_takes_nothing_new_and_is_emptied_by_its_ends() -> None:
    """`emptied` waits for the stream that runs; a new one fails at once."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            stream = cluster.gateway.open(request())
            await read(stream, at_least=1)
            cluster.gateway.drain()
            assert not cluster.gateway.ready
            assert (await failure(cluster.gateway.open(request("new")).next())).kind == "unavailable"
            emptied = asyncio.create_task(cluster.gateway.emptied())
            await read(stream, at_least=2)
            assert not emptied.done()
            await read_to_end(stream)
            await emptied

    run_virtually(scenario())


def test_giving_up_fails_what_runs_and_stops_it_on_the_workers() -> None:
    """Readers get what had come, then the error; the workers are told before the gateway ends."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            streams = [cluster.gateway.open(request(name, max_tokens=1000)) for name in ("a", "b")]
            for stream in streams:
                await read(stream, at_least=1)
            await asyncio.sleep(0.1)
            cluster.gateway.drain()
            cluster.gateway.give_up()
            await cluster.gateway.emptied()
            assert not cluster.workers["w1"].running
            for stream in streams:
                assert isinstance(await stream.next(), Delta)
                assert (await failure(stream.next())).kind == "unavailable"

    run_virtually(scenario())


def test_many_streams_share_one_message_a_step() -> None:
    """Rows are told apart by sequence; each reader gets its own tokens only."""

    async def scenario() -> None:
        async with Cluster("w1") as cluster:
            cluster.workers["w1"].step_s = 60.0
            names = [f"s{number}" for number in range(200)]
            streams = [cluster.gateway.open(request(name)) for name in names]
            await until(lambda: len(cluster.workers["w1"].running) == 200)
            for step in range(3):
                message = TokensGenerated(
                    worker="w1",
                    sequences=tuple(names),
                    generations=[1] * 200,
                    first_indices=[step] * 200,
                    counts=[1] * 200,
                    token_ids=[(number + step) % 251 for number in range(200)],
                )
                await cluster.workers["w1"].bus.publish(SUBJECTS.frontend_tokens("f"), encode(message))
            for number, stream in enumerate(streams):
                token_ids, _ = await read(stream, at_least=3)
                assert token_ids == [(number + step) % 251 for step in range(3)]

    run_virtually(scenario())
