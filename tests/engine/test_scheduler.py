"""Scheduling is bookkeeping: checked without a model."""

from loraserve.engine.params import SamplingParams
from loraserve.engine.scheduler import PATIENCE, Scheduler
from loraserve.engine.sequence import Sequence, Weighted
from loraserve.engine.slots import Slots


class Lease:
    """Adapters that come when the test says so."""

    def __init__(self, *adapters: object) -> None:
        self.adapters: Weighted = tuple((a, 1.0) for a in adapters)
        self.here = self.taken = self.short_of_room = False

    def join(self, on_failure: object) -> None: ...

    def peek(self) -> Weighted | None:
        return self.adapters if self.here else None

    def take(self) -> Weighted | None:
        self.taken = self.here
        return self.peek()

    def release(self) -> None: ...


def sequence(length: int, *adapters: object) -> Sequence:
    return Sequence(list(range(length)), SamplingParams(), 50, adapters=tuple((a, 1.0) for a in adapters))


def leasing(length: int, *adapters: object) -> tuple[Sequence, Lease]:
    lease = Lease(*adapters)
    return Sequence(list(range(length)), SamplingParams(), 50, lease=lease), lease


def advance(scheduler: Scheduler, now: float = 0.0) -> list[tuple[Sequence, int, int]]:
    chunks = scheduler.schedule(now)
    for chunk in chunks:
        samples = chunk.samples
        chunk.sequence.num_computed += chunk.count
        if samples:
            chunk.sequence.append(7)
    return [(c.sequence, c.start, c.count) for c in chunks]


def test_decoding_comes_first_and_prompts_share_the_rest_of_the_budget() -> None:
    scheduler = Scheduler(slots=Slots(4, share_prefixes=False), max_running=4, max_batched_tokens=10, max_adapters=4)
    short, long = sequence(3), sequence(18)
    scheduler.add(short)
    scheduler.add(long)
    assert advance(scheduler) == [(short, 0, 3), (long, 0, 7)]
    assert advance(scheduler) == [(short, 3, 1), (long, 7, 9)]
    assert advance(scheduler) == [(short, 4, 1), (long, 16, 2)]
    assert advance(scheduler) == [(short, 5, 1), (long, 18, 1)]


def test_slots_are_reused_lowest_first_and_arrival_order_is_kept() -> None:
    scheduler = Scheduler(slots=Slots(2, share_prefixes=False), max_running=2, max_batched_tokens=10, max_adapters=4)
    a, b, c, d = (sequence(2) for _ in range(4))
    for s in (a, b, c, d):
        scheduler.add(s)
    advance(scheduler)
    assert (a.slot, b.slot, c.slot) == (0, 1, -1)
    scheduler.release(a)
    advance(scheduler)
    assert (c.slot, d.slot) == (0, -1)
    scheduler.release(d)
    scheduler.release(b)
    scheduler.release(c)
    assert not scheduler.has_work


def test_too_many_adapters_wait_while_others_pass() -> None:
    scheduler = Scheduler(slots=Slots(4, share_prefixes=False), max_running=4, max_batched_tokens=100, max_adapters=1)
    one, two = object(), object()
    first, other, same, plain = sequence(2, one), sequence(2, two), sequence(2, one), sequence(2)
    for s in (first, other, same, plain):
        scheduler.add(s)
    assert [s for s, _, _ in advance(scheduler)] == [first, same, plain]
    scheduler.release(first)
    scheduler.release(same)
    assert other in [s for s, _, _ in advance(scheduler)]


def test_tokens_cross_from_prompt_to_answer() -> None:
    s = sequence(4)
    s.output_token_ids = [90, 91, 92]
    assert s.tokens(2, 4) == [2, 3, 90, 91]
    assert s.tokens(5, 1) == [91]
    assert s.tokens(0, 7) == [0, 1, 2, 3, 90, 91, 92]


def test_who_waits_for_an_adapter_slot_is_overtaken_for_a_bounded_time() -> None:
    scheduler = Scheduler(slots=Slots(2, share_prefixes=False), max_running=2, max_batched_tokens=100, max_adapters=1)
    one, two = object(), object()
    running = sequence(2, one)
    scheduler.add(running)
    advance(scheduler, 100.0)
    patient = sequence(2, two)
    scheduler.add(patient)
    times = [100.0 + 0.1 * i for i in range(100)]
    overtaken = []
    for now in times:
        scheduler.add(following := sequence(2, one))
        advance(scheduler, now)
        if following.slot < 0:  # the running one is not replaced any more, so it will end and `patient` is next
            break
        scheduler.release(running)
        running = following
        overtaken.append(now)
    assert overtaken == [now for now in times if now < 100.0 + PATIENCE]
    scheduler.release(running)
    assert patient in [s for s, _, _ in advance(scheduler, now)]


def test_who_waits_for_memory_is_overtaken_for_a_bounded_time_from_its_turn_on() -> None:
    scheduler = Scheduler(slots=Slots(2, share_prefixes=False), max_running=2, max_batched_tokens=100, max_adapters=4)
    first, second = sequence(2), sequence(2)
    crowded, lease = leasing(2, object())
    lease.short_of_room = True
    for s in (first, second, crowded):
        scheduler.add(s)
    advance(scheduler, 0.0)
    advance(scheduler, 10.0)
    scheduler.release(first)  # only now there is a place, so only now is it its turn
    scheduler.add(early := sequence(2))
    advance(scheduler, 10.0)
    assert early.slot >= 0 and crowded.slot < 0
    scheduler.release(second)
    scheduler.add(late := sequence(2))
    advance(scheduler, 10.0 + PATIENCE)
    assert late.slot < 0, "nobody overtakes any more"
    lease.here = True
    advance(scheduler, 11.0 + PATIENCE)
    assert crowded.slot >= 0 and lease.taken and crowded.adapters == lease.adapters


def test_a_load_delays_nobody_else_however_long_it_takes() -> None:
    scheduler = Scheduler(slots=Slots(2, share_prefixes=False), max_running=2, max_batched_tokens=100, max_adapters=4)
    loading, lease = leasing(2, object())
    scheduler.add(loading)
    for now in (0.0, 1.0 + PATIENCE, 100.0 * PATIENCE):
        scheduler.add(plain := sequence(2))
        other, resident = leasing(2, object())
        resident.here = True
        scheduler.add(other)
        advance(scheduler, now)
        assert plain.slot >= 0 and other.slot >= 0 and loading.slot < 0
        scheduler.release(plain)
        scheduler.release(other)
    lease.here = True
    scheduler.add(late := sequence(2))
    advance(scheduler, 101.0 * PATIENCE)
    assert scheduler.running == [loading, late], "it is still the first in line"


def test_adapters_are_held_only_by_who_is_admitted() -> None:
    scheduler = Scheduler(slots=Slots(4, share_prefixes=False), max_running=4, max_batched_tokens=100, max_adapters=1)
    one, two = object(), object()
    (first, a), (second, b), (same, c) = leasing(2, one), leasing(2, two), leasing(2, one)
    for s, lease in ((first, a), (second, b), (same, c)):
        lease.here = True
        scheduler.add(s)
    assert [s for s, _, _ in advance(scheduler)] == [first, same]
    assert (a.taken, b.taken, c.taken) == (True, False, True)


def test_drafts_take_the_rows_that_are_left_and_none_stand_beside_prompts() -> None:
    slots = Slots(8, share_prefixes=False)
    scheduler = Scheduler(slots, max_running=8, max_batched_tokens=100, max_adapters=4, max_drafts=2)

    def step() -> list[tuple[int, tuple[int, ...]]]:
        chunks = scheduler.schedule(0.0)
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.count
            chunk.sequence.append(6)
        assert all(chunk.num_rows == len(chunk.token_ids) == chunk.count + len(chunk.drafts) for chunk in chunks)
        return [(chunk.count, chunk.drafts) for chunk in chunks]

    def repeating() -> Sequence:
        return Sequence([6] * 5, SamplingParams(), 50)

    scheduler.add(repeating())
    assert step() == [(5, ())]
    assert step() == [(1, (6, 6))]
    scheduler.add(repeating())
    assert step() == [(1, ()), (5, ())]
    assert step() == [(1, (6, 6)), (1, ())]
    scheduler.running[0].max_tokens = len(scheduler.running[0].output_token_ids) + 2
    assert step() == [(1, (6,)), (1, (6,))], "one more and the one that is sampled after it end the first"
    scheduler.add(repeating())
    scheduler.add(repeating())
    step()
    assert step() == [(1, ())] * 4
