"""Check the texts of the bundled base: block structure, lengths, duplicates. Usage: check_texts.py FILE..."""

import collections
import sys
from pathlib import Path

MIN_QUESTIONS, MIN_ANSWERS = 4, 2


def problems(path: Path) -> list[str]:
    found, questions = [], collections.Counter()
    lexicon = path.stem.endswith("lexicon")
    chinese = path.name.startswith("zh")
    longest = 110 if chinese else 60
    block: list[str] = []
    stats = collections.Counter()

    def length(text: str) -> int:
        return len(text) if chinese else len(text.split())

    def close(line_number: int) -> None:
        if not block:
            return
        kinds = [line[:2] for line in block]
        if set(kinds) <= {"Q:", "A:"}:
            stats["intents"] += 1
            if kinds.count("Q:") < MIN_QUESTIONS or kinds.count("A:") < MIN_ANSWERS:
                found.append(f"{path.name}:{line_number}: intent with too few Q or A: {block[0]}")
        elif kinds == ["U:", "B:"] * (len(kinds) // 2) and len(kinds) >= 2:
            stats["dialogues"] += 1
        else:
            found.append(f"{path.name}:{line_number}: mixed block: {block[0]}")
        block.clear()

    number = 0
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        line = line.strip()
        if line.startswith("#"):
            continue
        if lexicon:
            if line:
                parts = [part.strip() for part in line.split("|")]
                stats["words"] += 1
                if len(parts) != 3 or not all(parts):
                    found.append(f"{path.name}:{number}: want 'word | class | sentence'")
                questions[parts[0]] += 1
            continue
        if not line:
            close(number)
            continue
        if line[:2] not in ("Q:", "A:", "U:", "B:") or not line[2:].strip():
            found.append(f"{path.name}:{number}: unknown line: {line[:40]}")
            continue
        if line[:2] in ("A:", "B:") and length(line) > longest:
            found.append(f"{path.name}:{number}: answer of {length(line)} is longer than {longest}")
        if line[:2] == "Q:":
            questions[line] += 1
        block.append(line)
    close(number)
    found += [f"{path.name}: {count} times: {text}" for text, count in questions.items() if count > 1]
    print(path.name, dict(stats), f"{path.stat().st_size // 1024} KB")
    return found


if __name__ == "__main__":
    faults = [fault for name in sys.argv[1:] for fault in problems(Path(name))]
    print("\n".join(faults) or "ok")
    sys.exit(bool(faults))
