"""Who gets which cache slot, and what is shared: bookkeeping, checked without a model."""

from dataclasses import dataclass

from loraserve.engine.params import SamplingParams
from loraserve.engine.sequence import Sequence
from loraserve.engine.slots import MIN_SHARED, SHORT_TAIL, Copy, Slots


@dataclass(frozen=True)
class Content:
    digest: str


def sequence(tokens: list[int], *adapters: tuple[str, float], merged: str | None = None) -> Sequence:
    weighted = tuple((Content(digest), weight) for digest, weight in adapters)
    return Sequence(tokens, SamplingParams(), 50, weighted, merged=Content(merged) if merged else None)


def run(slots: Slots, tokens: list[int], *adapters: tuple[str, float], merged: str | None = None) -> Sequence:
    """A sequence that has come, computed its prompt, and gone."""
    done = sequence(tokens, *adapters, merged=merged)
    slots.take(done)
    done.num_computed = len(tokens)
    slots.give_back(done)
    return done


HISTORY = list(range(100, 200))


def test_next_turn_of_a_conversation_goes_on_in_its_slot() -> None:
    slots = Slots(4)
    run(slots, HISTORY)
    turn = sequence([*HISTORY, 1, 2, 3])
    assert slots.take(turn) is None, "nothing to copy: it is the same slot"
    assert (turn.slot, turn.num_computed, turn.num_shared) == (0, 100, 100)
    assert slots.num_shared_tokens == 100


def test_shared_beginning_is_copied_and_the_longer_past_stays() -> None:
    slots = Slots(4)
    run(slots, HISTORY)
    other = sequence([*HISTORY[:50], *range(60)])
    assert slots.take(other) == Copy(source=0, target=1, count=50)
    assert other.num_computed == 50
    again = sequence([*HISTORY, 9])
    assert slots.take(again) is None and again.slot == 0


def test_prefix_of_a_running_sequence_is_shared_as_far_as_it_is_computed() -> None:
    slots = Slots(4)
    running = sequence(HISTORY)
    slots.take(running)
    running.num_computed = 30
    other = sequence([*HISTORY, 1])
    assert slots.take(other) == Copy(source=0, target=1, count=30)


def test_what_is_shorter_than_the_shortest_prefix_shares_nothing_even_with_its_like() -> None:
    for length in (1, 2, MIN_SHARED):
        slots = Slots(4)
        running, held = sequence(HISTORY[:1]), run(slots, HISTORY[: length - 1])
        slots.take(running)
        other = sequence(HISTORY[:length])
        assert held.slot == -1 and slots.take(other) is None and other.num_computed == 0


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    slots = Slots(4)
    run(slots, HISTORY)
    same = sequence(HISTORY)
    slots.take(same)
    assert same.num_computed == len(HISTORY) - 1


def test_only_values_of_the_same_weights_are_shared() -> None:
    slots = Slots(8)
    run(slots, HISTORY, ("x", 1.0))
    for stranger in [
        sequence([*HISTORY, 1]),
        sequence([*HISTORY, 1], ("x", 0.5)),
        sequence([*HISTORY, 1], ("y", 1.0)),
        sequence([*HISTORY, 1], ("x", 1.0), ("y", 1.0)),
        sequence([*HISTORY, 1], merged="x"),
    ]:
        assert slots.take(stranger) is None and stranger.num_computed == 0
    friend = sequence([*HISTORY, 1], ("x", 1.0))
    slots.take(friend)
    assert friend.num_computed == 100


def test_least_recently_used_is_given_up_first() -> None:
    slots = Slots(2)
    a, b = list(range(50)), list(range(1000, 1050))
    run(slots, a)
    run(slots, b)
    run(slots, [*a, 7])  # used again, in its own slot
    run(slots, list(range(2000, 2050)))
    kept = sequence([*a, 7, 8])
    slots.take(kept)
    assert kept.num_computed == 51
    lost = sequence([*b, 8])
    slots.take(lost)
    assert lost.num_computed == 0


def test_source_that_is_itself_given_up_is_not_copied_to_itself() -> None:
    slots = Slots(1)
    run(slots, HISTORY)
    assert len(HISTORY) - 20 > SHORT_TAIL
    other = sequence([*HISTORY[:20], 1])
    assert slots.take(other) is None
    assert (other.slot, other.num_computed) == (0, 20)


def test_short_prefixes_and_unsound_values_are_not_shared() -> None:
    slots = Slots(4)
    run(slots, HISTORY)
    brief = sequence([*HISTORY[: MIN_SHARED - 1], 1, 2])
    slots.take(brief)
    assert brief.num_computed == 0
    bad = sequence(list(range(50)))
    slots.take(bad)
    bad.num_computed = 50
    slots.give_back(bad, keep=False)
    after = sequence([*range(50), 1])
    slots.take(after)
    assert after.num_computed == 0


def test_turned_off_it_shares_nothing() -> None:
    slots = Slots(4, share_prefixes=False)
    run(slots, HISTORY)
    again = sequence([*HISTORY, 1])
    assert slots.take(again) is None and again.num_computed == 0 and slots.num_held == 0


def test_equal_prompts_shorter_than_what_pays_share_nothing() -> None:
    slots = Slots(4)
    run(slots, [1, 2, 3, 4])
    twin = sequence([1, 2, 3, 4])
    assert slots.take(twin) is None and twin.num_computed == 0
