"""Preference pairs: two dialogues that answer the same prompt, one better than the other.

    {"chosen": [{"role": ..., "content": ...}, ...], "rejected": [{"role": ..., "content": ...}, ...]}

Both lists begin with the same messages and end with an answer of the assistant, in which they differ; that answer alone
is supervised. Sources: MiniMind's `dpo.jsonl`; OpenAI's preference fine-tuning, whose rows say the same as

    {"input": {"messages": [...], "tools": [...]}, "preferred_output": [...], "non_preferred_output": [...]}
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loraserve.train.dialogue import Dialogue, parse_object, read_messages
from loraserve.train.rows import BadRow, Row

if TYPE_CHECKING:
    from loraserve.train.data import Encoder, Encoding

PAIR_EXAMPLE = (
    '{"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], '
    '"rejected": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go away."}]}'
)


@dataclass(frozen=True)
class Pair:
    """Two dialogues with the same messages but for the last."""

    chosen: Dialogue
    rejected: Dialogue


def read_pair(row: Row) -> Pair:
    """Return what a row says.

    Raises:
        BadRow: it is no UTF-8, no JSON, no pair; a dialogue of it is none, or does not end with an answer; the prompts
            differ, or the answers do not.
    """
    value = _unified(parse_object(row.raw))
    missing = [field for field in ("chosen", "rejected") if value.get(field) is None]
    if missing:
        raise BadRow(f"has no {' and no '.join(map(repr, missing))}, as a preference pair has, like {PAIR_EXAMPLE}")
    dialogues = []
    for field in ("chosen", "rejected"):
        try:
            dialogues.append(read_messages(value, field, "preference"))
        except BadRow as error:
            raise BadRow(f"{field!r}: {error}") from None
        if dialogues[-1].messages[-1]["role"] != "assistant":
            raise BadRow(f"{field!r} does not end with an assistant message")
    chosen, rejected = dialogues
    if chosen.messages[:-1] != rejected.messages[:-1] or chosen.tools != rejected.tools:
        raise BadRow("'chosen' and 'rejected' answer different prompts: they may differ in the last message only")
    if chosen == rejected:
        raise BadRow("'chosen' and 'rejected' are the same: there is nothing to prefer")
    return Pair(chosen, rejected)


def _unified(value: dict[str, Any]) -> dict[str, Any]:
    """An OpenAI row as one with `chosen` and `rejected`; any other as it is."""
    given, outputs = value.get("input"), {"chosen": "preferred_output", "rejected": "non_preferred_output"}
    if not any(name in value for name in outputs.values()):
        return value
    prompt = given.get("messages") if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(prompt, list):
        raise BadRow("'input' has no 'messages', a list, as OpenAI's preference pairs have")
    sides: dict[str, Any] = {}
    for side, name in outputs.items():
        if not isinstance(value.get(name), list) or not value[name]:
            raise BadRow(f"has no {name!r}, a list of messages, as OpenAI's preference pairs have")
        sides[side] = [*prompt, *value[name]]
    return {**value, **sides, "tools": given.get("tools") or value.get("tools")}


def encode_pair(encoder: "Encoder", pair: Pair) -> "tuple[Encoding, Encoding]":
    """Return both dialogues as they are trained on, chosen first. Raises BadRow as `Encoder.encode` does."""
    encodings = []
    for field, dialogue in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        try:
            encodings.append(encoder.encode(dialogue))
        except BadRow as error:
            raise BadRow(f"{field!r}: {error}") from None
    chosen, rejected = encodings
    if chosen.input_ids == rejected.input_ids:
        raise BadRow(
            f"'chosen' and 'rejected' are the same within {encoder.limit} tokens; raise --max-seq-len, or correct them"
        )
    return _only_last_answer(chosen), _only_last_answer(rejected)


def _only_last_answer(encoding: "Encoding") -> "Encoding":
    mask = encoding.supervised
    last = max(i for i, now in enumerate(mask) if now and not (i and mask[i - 1]))
    return replace(encoding, supervised=[i >= last and now for i, now in enumerate(mask)])
