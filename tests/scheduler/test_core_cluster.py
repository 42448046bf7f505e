"""A whole cluster in virtual time: scripted workers that grow, fill up, refuse, die; frontends that keep asking."""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import pytest

from mell_scheduler.core import (
    Command,
    CoreSettings,
    Event,
    LeadershipTaken,
    PlaceRequested,
    Reply,
    SchedulerCore,
    Tick,
)
from mell_scheduler.policy import POLICY_NAMES, PolicySettings, make_policy
from mell_shared.messages.scheduler import Placed, Queued, SequenceFinished, WorkerJoined
from tests.scheduler.script import SECOND, place_request, worker_report, worker_spec

TOKENS_PER_S = 40
LATENCY_US = 2_000


@dataclass
class Job:
    """One request's life, as its frontend sees it."""

    name: str
    prompt: int
    output: int
    born_us: int
    generation: int = 0
    worker: str = ""
    excluded: tuple[str, ...] = ()
    asked_us: int = 0
    first_us: int = 0
    done_us: int = 0


@dataclass
class Box:
    """A worker that admits what fits now, and preempts nobody: what outgrows it is counted."""

    name: str
    kv_blocks: int
    jobs: dict[str, tuple[Job, int]] = field(default_factory=dict)
    """Name -> (job, when it began)."""
    number: int = 0
    alive: bool = True

    def blocks(self, job: Job, began_us: int, now_us: int) -> int:
        """What a job holds now."""
        made = min(job.output, (now_us - began_us) * TOKENS_PER_S // SECOND)
        return -(-(job.prompt + made) // 16)

    def used(self, now_us: int) -> int:
        """Blocks held by all jobs."""
        return sum(self.blocks(job, began_us, now_us) for job, began_us in self.jobs.values())


class Cluster:
    """An agenda of what happens when; the core is called as the service would call it."""

    def __init__(self, seed: int, boxes: int, kv_blocks: int, policy_name: str = "best-fit") -> None:
        self.random = random.Random(seed)
        self.now_us = 0
        self.agenda: list[tuple[int, int, Callable[[], None]]] = []
        self.count = 0
        policy = make_policy(policy_name, PolicySettings(head_room=0.1))
        self.core = SchedulerCore(policy, CoreSettings(), 0)
        self.boxes = {f"w{number}": Box(f"w{number}", kv_blocks) for number in range(boxes)}
        self.jobs: dict[str, Job] = {}
        self.held: dict[str, Job] = {}
        self.refusals = 0
        self.outgrown = 0
        self.transcript: list[Command] = []
        self.tell(LeadershipTaken(1))
        for box in self.boxes.values():
            self.tell(WorkerJoined(spec=worker_spec(box.name, kv_blocks=kv_blocks)))
            self.after(self.random.randrange(SECOND), partial(self.report, box))
        self.after(0, self.tick)

    def after(self, delay_us: int, action: Callable[[], None]) -> None:
        """Do something later."""
        self.count += 1
        heapq.heappush(self.agenda, (self.now_us + delay_us, self.count, action))

    def run(self, until_us: int) -> None:
        """Let time pass."""
        while self.agenda[0][0] <= until_us:
            self.now_us, _, action = heapq.heappop(self.agenda)
            action()

    def tell(self, event: Event) -> None:
        """Give the core an event; carry out its replies after the network's latency."""
        commands = self.core.handle(event, self.now_us)
        self.transcript += commands
        for command in commands:
            if isinstance(command, Reply):
                job = self.held.pop(command.handle)
                assert self.now_us - job.asked_us <= SECOND, "a reply came after more than a second"
                self.after(LATENCY_US, partial(self.answered, job, command))

    def tick(self) -> None:
        """The service's tick."""
        self.tell(Tick())
        self.after(SECOND // 10, self.tick)

    def report(self, box: Box) -> None:
        """A worker's report, every second."""
        if not box.alive:
            return
        box.number += 1
        rows = [
            (job.name, job.generation, job.prompt + self.made(job, began_us), box.blocks(job, began_us, self.now_us))
            for job, began_us in box.jobs.values()
        ]
        used = box.used(self.now_us)
        self.outgrown += used > box.kv_blocks
        spec = worker_spec(box.name, kv_blocks=box.kv_blocks)
        free = max(0, box.kv_blocks - used)
        report = worker_report(spec, box.number, *rows, used_blocks=used, free_blocks=free)
        self.after(LATENCY_US, partial(self.tell, report))
        self.after(SECOND, partial(self.report, box))

    def made(self, job: Job, began_us: int) -> int:
        """Output tokens so far."""
        return min(job.output, (self.now_us - began_us) * TOKENS_PER_S // SECOND)

    def submit_job(self, name: str, prompt: int, output: int) -> None:
        """A client's request arrives at a frontend."""
        job = self.jobs[name] = Job(name, prompt, output, self.now_us)
        self.ask(job)

    def ask(self, job: Job) -> None:
        """The frontend asks for a place, for a new generation each time it will submit."""
        job.asked_us = self.now_us
        self.count += 1
        handle = f"{job.name}#{self.count}"
        self.held[handle] = job
        waited_s = (self.now_us - job.born_us) / SECOND
        request = place_request(
            job.name, job.prompt, job.output, generation=job.generation + 1, excluded=job.excluded, waited_s=waited_s
        )
        self.after(LATENCY_US, partial(self.tell, PlaceRequested(handle, request)))

    def answered(self, job: Job, command: Reply) -> None:
        """The frontend submits, or asks again."""
        assert isinstance(command.reply, Placed | Queued), f"rejected: {command.reply}"
        if isinstance(command.reply, Queued):
            job.excluded = ()
            self.ask(job)
            return
        job.generation += 1
        job.worker = command.reply.worker
        self.after(LATENCY_US, partial(self.submitted, job, self.boxes[job.worker]))

    def submitted(self, job: Job, box: Box) -> None:
        """The worker admits the job if it fits now, else refuses it; a dead one is noticed by silence."""
        if not box.alive:
            self.after(2 * SECOND, partial(self.lost, job))
            return
        if box.used(self.now_us) + -(-job.prompt // 16) > box.kv_blocks:
            self.refusals += 1
            job.excluded = (box.name,)
            self.after(LATENCY_US, partial(self.ask, job))
            return
        box.jobs[job.name] = (job, self.now_us)
        job.first_us = job.first_us or self.now_us
        duration_us = job.output * SECOND // TOKENS_PER_S
        self.after(duration_us, partial(self.finished, job, box, job.generation))

    def finished(self, job: Job, box: Box, generation: int) -> None:
        """The job's last token."""
        if not box.alive or job.generation != generation:
            return
        del box.jobs[job.name]
        job.done_us = self.now_us
        event = SequenceFinished(worker=box.name, sequence=job.name, generation=generation, reason="stop")
        self.after(LATENCY_US, partial(self.tell, event))

    def kill(self, name: str) -> None:
        """A worker dies; its jobs' frontends notice after a few seconds."""
        box = self.boxes[name]
        box.alive = False
        for job, _ in box.jobs.values():
            self.after(5 * SECOND, partial(self.lost, job))

    def lost(self, job: Job) -> None:
        """The frontend gives the worker up and places the job anew."""
        job.excluded = (job.worker,)
        self.ask(job)


def busy_cluster(seed: int, jobs: int, per_s: float, policy: str = "best-fit") -> Cluster:
    """Four workers of 100 blocks, and Poisson arrivals of mixed sizes, some of nearly a whole worker."""
    cluster = Cluster(seed, 4, 100, policy)
    at_s = 2.0
    for number in range(jobs):
        at_s += cluster.random.expovariate(per_s)
        prompt = cluster.random.choice((30, 60, 120, 240, 1_200))
        output = 150 if prompt == 1_200 else cluster.random.randrange(20, 200)
        cluster.after(int(at_s * SECOND), partial(cluster.submit_job, f"j{number}", prompt, output))
    return cluster


@pytest.mark.parametrize("seed", range(3))
def test_every_request_is_served_under_overload(seed: int) -> None:
    """Twice as much as fits arrives: all wait, none starves, and what is placed is what workers have room for."""
    cluster = busy_cluster(seed, jobs=300, per_s=10.0)
    cluster.run(400 * SECOND)
    cluster.core.check()
    assert all(job.done_us for job in cluster.jobs.values())
    assert not cluster.held
    assert not cluster.core.ledger.sequences
    large = sorted((j for j in cluster.jobs.values() if j.prompt == 1_200), key=lambda job: job.first_us)
    assert large == sorted(large, key=lambda job: job.born_us), "a large request was overtaken by an equal one"
    longest_us = 200 * SECOND // TOKENS_PER_S
    for before, after in pairwise(large):
        at_head_us = after.first_us - max(before.first_us, after.born_us)
        assert at_head_us <= longest_us + 2 * SECOND, "its turn came, and small ones went on being placed before it"
    assert cluster.refusals <= 3, "placements did not fit: the books are wrong"


def test_a_dead_worker_costs_time_not_requests() -> None:
    """Jobs of a worker that dies are placed again; nothing goes there once it is silent."""
    cluster = busy_cluster(7, jobs=120, per_s=3.0)
    cluster.after(20 * SECOND, partial(cluster.kill, "w0"))
    cluster.run(26 * SECOND)
    before = len(cluster.transcript)
    cluster.run(300 * SECOND)
    late = [c.reply.worker for c in cluster.transcript[before:] if isinstance(c, Reply) and isinstance(c.reply, Placed)]
    assert late
    assert "w0" not in late
    assert all(job.done_us for job in cluster.jobs.values())


def test_a_light_load_waits_for_nobody() -> None:
    """Where there is room, a placement takes a round trip."""
    cluster = busy_cluster(1, jobs=60, per_s=0.4)
    cluster.run(300 * SECOND)
    assert all(job.done_us for job in cluster.jobs.values())
    assert max(job.first_us - job.born_us for job in cluster.jobs.values()) == 3 * LATENCY_US


def test_the_same_seed_gives_the_same_commands() -> None:
    """A cluster run is a function of its seed."""
    runs = []
    for _ in range(2):
        cluster = busy_cluster(3, jobs=100, per_s=10.0)
        cluster.run(60 * SECOND)
        runs.append(cluster.transcript)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_policy_can_place(policy: str) -> None:
    """The core works with each, and none of them places what does not fit."""
    cluster = busy_cluster(5, jobs=80, per_s=8.0, policy=policy)
    cluster.run(30 * SECOND)
    cluster.core.check()
    cluster.run(200 * SECOND)
    assert all(job.done_us for job in cluster.jobs.values())
    assert cluster.refusals == 0
