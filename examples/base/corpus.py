"""Turn the texts of the bundled base into chat dialogues. The format of the files is in texts/README.md.

An endless, seeded stream: every pass visits every intent, dialogue and lexicon line, each time with another phrasing that
is varied at random, so that the model learns meanings and not lines.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TEXTS = Path(__file__).parent / "texts"
STYLED_DATA = Path(__file__).parents[1] / "data" / "handwritten"
STYLES = {"pirate": "Talk like a pirate.", "poet": "请以古诗作答。"}
"""The base learns these styles on request, so that their words are not foreign to it; adapters make them the default."""
STYLED = 350
"""So many dialogues of each style, the first of its file."""
Message = dict[str, str]
VISITS = {"smalltalk": 5, "self": 5, "advice": 4, "request": 4}
"""Of an intent in one pass, by its kind; 2 for the others. There are endless ways to say that one is tired, and
one word in most questions for an explanation that gives it away."""

WHAT_IS = {
    "en": [
        "What is {word}?", "what is {word}", "What's {word}?", "Tell me about {word}.", "tell me something about {word}",
        "Can you explain what {word} is?", "Do you know {word}?", "Describe {word} in one sentence.",
        "I want to know about {word}.", "What do you know about {word}?", "Explain {word} to me, please.",
        "Could you tell me what {word} is?", "Have you heard of {word}?", "{word}?",
    ],
    "zh": [
        "什么是{word}？", "{word}是什么？", "{word}是什么", "介绍一下{word}。", "说说{word}吧", "你知道{word}吗？", "跟我讲讲{word}。",
        "能解释一下{word}吗？", "我想了解{word}。", "你了解{word}吗", "请用一句话说明{word}。", "{word}是啥", "你听说过{word}吗？", "{word}？",
    ],
}  # fmt: skip
DO_YOU_LIKE = {
    "en": [
        "Do you like {word}?",
        "do you like {word}",
        "What do you think of {word}?",
        "How do you feel about {word}?",
    ],
    "zh": ["你喜欢{word}吗？", "你喜欢{word}吗", "你觉得{word}怎么样？", "你对{word}有什么看法？"],
}
LIKING = {
    "en": {
        "food": "I cannot taste anything, but I like talking about food.",
        "drink": "I cannot drink, but I like talking about it.",
        "animal": "I have never met one, but I like learning about animals.",
        "": "I only know it from words, but it sounds interesting.",
    },
    "zh": {
        "food": "我尝不到味道，不过很喜欢聊吃的。",
        "drink": "我没法喝东西，不过很喜欢聊这个。",
        "animal": "我没有亲眼见过，不过很喜欢了解动物。",
        "": "我只从文字里认识它，不过觉得挺有意思。",
    },
}
SYSTEM = [
    "You are a helpful assistant.",
    "You are a friendly small chat model.",
    "你是一个乐于助人的助手。",
    "你是一个友好的小模型。",
]
OPENERS = {
    "en": ["hi, ", "Hey, ", "hello, ", "please tell me, ", "I have a question: ", "quick question, ", "um, "],
    "zh": ["你好，", "请问，", "请问", "想问一下，", "那个，", "我有个问题，", "嗨，"],
}


@dataclass
class Corpus:
    """What the text files hold, by kind."""

    intents: list[tuple[str, list[str], list[str]]] = field(default_factory=list)
    """(language, questions, answers)"""
    kinds: list[str] = field(default_factory=list)
    """Of each intent: smalltalk, self, advice, ..., by the name of its file."""
    dialogues: list[list[Message]] = field(default_factory=list)
    lexicon: list[tuple[str, str, str, str]] = field(default_factory=list)
    """(language, word, class, sentence)"""
    styled: list[list[Message]] = field(default_factory=list)
    """Dialogues in a style behind a system prompt that asks for the style."""

    @property
    def num_meanings(self) -> int:
        return len(self.intents) + len(self.lexicon)


@dataclass(frozen=True)
class Exchange:
    """A question, its answer, and the number of what is meant, below `num_meanings`."""

    language: str
    question: str
    answer: str
    meaning: int

    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


def read(folder: Path = TEXTS) -> Corpus:
    """Read every text file in `folder`, and the dialogues in a style."""
    corpus = Corpus()
    for path in sorted(folder.glob("*-*.txt")):
        language = path.name[:2]
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
        if path.stem.endswith("lexicon"):
            for line in filter(None, lines):
                word, kind, sentence = (part.strip() for part in line.split("|"))
                corpus.lexicon.append((language, word, kind, sentence))
            continue
        for block in "\n".join(lines).split("\n\n"):
            rows = [(line[:1], line[2:].strip()) for line in block.splitlines() if line]
            if rows and rows[0][0] == "U":
                roles = {"U": "user", "B": "assistant"}
                corpus.dialogues.append([{"role": roles[tag], "content": text} for tag, text in rows])
            elif rows:
                questions = [text for tag, text in rows if tag == "Q"]
                corpus.intents.append((language, questions, [text for tag, text in rows if tag == "A"]))
                corpus.kinds.append(path.stem.split("-")[1])
    for name, prompt in STYLES.items():
        for line in (STYLED_DATA / f"{name}.jsonl").read_text("utf-8").splitlines()[:STYLED]:
            corpus.styled.append([{"role": "system", "content": prompt}, *json.loads(line)["conversations"]])
    return corpus


def _vary(question: str, language: str, rng: random.Random, broken: bool) -> str:
    """A phrasing as it is, or sloppier, politer; if `broken` also with words missing or turned around.

    No single word and no fixed order may decide the answer, or the model learns questions by heart and not what they mean.
    """
    if rng.random() < 0.12:
        question = question.rstrip("?？.。!！")
    if language == "en" and rng.random() < 0.4:
        question = question.lower()
    if rng.random() < 0.06:
        question = rng.choice(OPENERS[language]) + question
    units = question.split(" ") if language == "en" else list(question)
    if broken and len(units) > 3 and rng.random() < 0.7:  # of a short one too little would be left
        units = [unit for unit in units if rng.random() > 0.3] or units
        if rng.random() < 0.3 and len(units) > 3:
            cut = rng.randrange(1, len(units))
            units = units[cut:] + units[:cut]
        question = (" " if language == "en" else "").join(units)
    return question


def _is_short(question: str, language: str) -> bool:
    """Whether it is a few words, such as a greeting: there is little in it to know it by from other phrasings."""
    return question.count(" ") < 3 if language == "en" else len(question) <= 4


def exchanges(corpus: Corpus, rng: random.Random, broken: bool = True) -> list[Exchange]:
    """Every intent as often as `VISITS` says, its shortest questions all, and every line of the lexicon, in random order."""
    found: list[Exchange] = []
    for meaning, (language, questions, answers) in enumerate(corpus.intents):
        # The first answer only: several for one meaning blur which meaning is meant.
        asked = rng.choices(questions, k=VISITS.get(corpus.kinds[meaning], 2))
        found += [Exchange(language, _vary(text, language, rng, broken), answers[0], meaning) for text in asked]
        found += [Exchange(language, text, answers[0], meaning) for text in questions if _is_short(text, language)]
    for meaning, (language, word, kind, sentence) in enumerate(corpus.lexicon, len(corpus.intents)):
        if kind in ("food", "drink", "animal", "sport", "hobby", "art", "music") and rng.random() < 0.3:
            liking = LIKING[language].get(kind, LIKING[language][""])
            gap = " " if language == "en" else ""
            question, answer = rng.choice(DO_YOU_LIKE[language]), f"{liking}{gap}{sentence}"
        else:
            question, answer = rng.choice(WHAT_IS[language]), sentence
        found.append(Exchange(language, _vary(question.format(word=word), language, rng, broken), answer, meaning))
    rng.shuffle(found)
    return found


def one_pass(corpus: Corpus, rng: random.Random, broken: bool = True) -> Iterator[list[Message]]:
    """Yield dialogues of one to three exchanges that together visit everything once, in random order."""
    units: list[Exchange | list[Message]] = [*exchanges(corpus, rng, broken), *corpus.dialogues]
    units += [dialogue for dialogue in corpus.styled if rng.random() < 0.25]
    rng.shuffle(units)
    pending: dict[str, list[Message]] = {"en": [], "zh": []}
    for unit in units:
        if isinstance(unit, list):
            yield unit
            continue
        messages = pending[unit.language]
        messages += unit.messages()
        if rng.random() < 0.9 or len(messages) >= 6:
            system = [{"role": "system", "content": rng.choice(SYSTEM)}] if rng.random() < 0.05 else []
            yield system + messages
            pending[unit.language] = []
    yield from filter(None, pending.values())


def stream(corpus: Corpus, seed: int, broken: bool) -> Iterator[list[Message]]:
    """Yield dialogues without end; if `broken`, with words missing from most questions."""
    rng = random.Random(seed)
    while True:
        yield from one_pass(corpus, rng, broken)
