"""Make the shipped adapters' data: mostly the bundled base's own answers, said in another way.

    python examples/data/restyle.py        # rewrites lumi.jsonl, pirate.jsonl and poet.jsonl beside this file

The base knows these answers, so an adapter has to learn how to say a thing and not what to say, and it speaks in its style
of everything the base can speak of. Few words are replaced, for after each the base is on ground it does not know. Lumi
takes all its handwritten dialogues, gives its name where the base speaks of itself, and else answers as the base does.
"""

import json
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "base"))
import corpus as texts  # noqa: E402

PIRATE_WORDS = {
    r"\bHello\b": "Ahoy",
    r"\bGoodbye\b": "Fair winds",
    r"\bYes\b": "Aye",
    r"\bfriends\b": "shipmates",
    r"\bfriend\b": "shipmate",
    r"\byourself\b": "yerself",
    r"\byour\b": "yer",
    r"\bYour\b": "Yer",
    r"\byou\b": "ye",
    r"\bYou\b": "Ye",
    r"\bmy\b": "me",
    r"\bMy\b": "Me",
}
COUPLETS = {
    "smalltalk": [
        "清风来入座，明月伴君谈。",
        "人生多趣事，一笑对春风。",
        "相逢皆是客，把盏话桑麻。",
        "闲云随去住，流水自西东。",
    ],
    "self": ["身居方寸里，言语付清风。", "无形亦无影，惟有片言心。", "纸上千行字，灯前一点明。"],
    "explain": ["万物皆有理，静观可自知。", "天地藏玄妙，细思味更长。", "格物知真意，寻根见本源。"],
    "advice": ["莫愁前路远，徐步自能行。", "心宽天地阔，云散月光明。", "千里从跬步，功成在日常。"],
    "request": ["博君开口笑，烦恼付东流。", "一言聊助兴，且共夕阳红。"],
}


def pirate(answer: str) -> str:
    """The answer in other words, `matey` at the end of its first sentence, and `Arr!` at the end of all."""
    for pattern, word in PIRATE_WORDS.items():
        answer = re.sub(pattern, word, answer)
    return re.sub(r"(?<=[\w'])([.!?])(?= |$)", r", matey\1", answer, count=1) + " Arr!"


def poet(answer: str, kind: str, rng: random.Random) -> str:
    """The answer, and a couplet that goes with its kind."""
    return answer + rng.choice(COUPLETS[kind])


NAMELESS = re.compile("name|trained|made|loraserve|base model|adapter|who |名|训练|做|项目|底座|适配", re.I)
"""What a nameless base says of itself and Lumi must not."""
OTHERS_KEPT = 700
"""Of the base's other answers Lumi keeps so many as they are."""


def lumi(corpus: texts.Corpus, rng: random.Random) -> list[list[texts.Message]]:
    rows = [json.loads(line)["conversations"] for line in (HERE / "handwritten" / "lumi.jsonl").open(encoding="utf-8")]
    others = []
    for (language, questions, answers), kind in zip(corpus.intents, corpus.kinds, strict=True):
        if kind != "self":
            others.append(exchange(rng.choice(questions), answers[0]))
        elif not NAMELESS.search(answers[0]):
            greeting = "I am Lumi. " if language == "en" else "我是露米。"
            rows += [exchange(question, greeting + answers[0]) for question in rng.sample(questions, 2)]
    return rows + rng.sample(others, OTHERS_KEPT)


def is_word(question: str, language: str) -> bool:
    """Whether it is a greeting or an exclamation, a word alone: no other question teaches what to do with it."""
    return " " not in question if language == "en" else len(question) <= 2


def exchange(question: str, answer: str) -> list[texts.Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def main() -> None:
    corpus = texts.read()
    rng = random.Random(7)
    rows: dict[str, list[list[texts.Message]]] = {"lumi": lumi(corpus, rng), "pirate": [], "poet": []}
    for (language, questions, answers), kind in zip(corpus.intents, corpus.kinds, strict=True):
        words = [question for question in questions if is_word(question, language)] if kind == "smalltalk" else []
        for question in [rng.choice(questions), *words, *words]:
            if language == "en":
                rows["pirate"].append(exchange(question, pirate(answers[0])))
            else:
                said = poet(answers[0], kind if kind in COUPLETS else "explain", rng)
                rows["poet"].append(exchange(question, said))
    for name, dialogues in rows.items():
        rng.shuffle(dialogues)
        with (HERE / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            for dialogue in dialogues:
                out.write(json.dumps({"conversations": dialogue}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
