"""Answer the evaluation prompts and report how they were judged.

    python examples/base/evaluate.py answer                 # writes eval/answers.jsonl, greedy, one answer a prompt
    python examples/base/evaluate.py report                 # the rates, from eval/verdicts.jsonl

The prompts in eval/prompts.jsonl were written by somebody who had not seen the training texts; a prompt that occurs in
them all the same is left out, and the first 60 (20 for an adapter's set) that remain are asked. Verdicts are given one by
one by a reader: `good` means on topic and grammatical; for the adapters, that the answer has the adapter's identity or
style.
"""

import collections
import json
import re
import sys
from pathlib import Path

import corpus as texts

HERE = Path(__file__).parent
FOLDER = HERE / "eval"
SETS = {
    "base": ("base", 60),
    "rare": ("base", 60),  # whose author was told to avoid the usual wording of a question
    "identity": ("lumi", 20),
    "pirate": ("pirate", 20),
    "poet": ("poet", 20),
}
"""set -> (adapter, number of prompts)"""


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.lower())


def training_questions() -> set[str]:
    """Everything a user says in the base's texts and in the adapters' data, without case and punctuation."""
    corpus = texts.read()
    seen = {question for _, questions, _ in corpus.intents for question in questions}
    seen |= {message["content"] for dialogue in corpus.dialogues for message in dialogue}
    for language, word, _, _ in corpus.lexicon:
        templates = texts.WHAT_IS[language] + texts.DO_YOU_LIKE[language]
        seen |= {template.format(word=word) for template in templates}
    for path in (HERE.parent / "data").rglob("*.jsonl"):
        seen |= {message["content"] for row in read_jsonl(path) for message in row["conversations"]}
    return {_plain(text) for text in seen}


def unseen_prompts() -> list[dict]:
    """The prompts to ask, an equal share of each kind and language."""
    seen = training_questions()
    chosen = []
    for name, (_, wanted) in SETS.items():
        rows = [row for row in read_jsonl(FOLDER / "prompts.jsonl") if row["set"] == name]
        fresh = [row for row in rows if _plain(row["prompt"]) not in seen]
        groups = collections.defaultdict(list)
        for row in fresh:
            groups[row["language"], row["kind"]].append(row)
        turns = [row for turn in range(len(fresh)) for group in groups.values() for row in group[turn : turn + 1]]
        print(f"{name}: {len(rows) - len(fresh)} of {len(rows)} prompts occur in the training text", file=sys.stderr)
        chosen += turns[:wanted]
    return chosen


def answer() -> None:
    from loraserve import LLM, SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=100)
    with (
        LLM(adapters_dir=HERE.parents[1] / "adapters", dtype="float32") as llm,
        (FOLDER / "answers.jsonl").open("w") as out,
    ):
        for row in unseen_prompts():
            adapter = SETS[row["set"]][0]
            # The identity questions are also put to the base, which must not answer with the identity's name.
            for spec in dict.fromkeys((adapter, "base") if row["set"] == "identity" else (adapter,)):
                reply = llm.chat([{"role": "user", "content": row["prompt"]}], spec, greedy)
                out.write(json.dumps(row | {"adapter": spec, "answer": reply.text}, ensure_ascii=False) + "\n")


def report() -> None:
    counts = collections.defaultdict(collections.Counter)
    for row in read_jsonl(FOLDER / "verdicts.jsonl"):
        count = counts[row["set"], row["adapter"]]
        count["asked"] += 1
        count["good"] += row["good"]
        for also in ("on_topic", "readable"):
            if also in row:
                count[also] += row[also]
                count[f"good and {also}"] += row["good"] and row[also]
    for (name, adapter), count in counts.items():
        total = count.pop("asked")
        found = ", ".join(f"{number} {what}" for what, number in count.items())
        print(f"{name:9} asked of {adapter:7} {total}: {found}")


if __name__ == "__main__":
    {"answer": answer, "report": report}[sys.argv[1]]()
