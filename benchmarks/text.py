"""What generated text is like: beside real text of the same length, and never one figure alone.

    python -m benchmarks.text FOLDER

The folder is what `benchmarks.learning --write FOLDER` leaves: `train.json`, `real.json` and a file for each system,
lists of texts. Every text is cut to the same number of characters. The judge is an n-gram model of characters (nltk.lm,
interpolated by Witten and Bell's rule) of the training text.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

ORDER = 6  # characters: a short word and what stands beside it
UNKNOWN = "\x00"  # for characters that the training text does not have


def entropy(items: list) -> float:
    """Of the items' frequencies, in bits."""
    counts = Counter(items)
    return -sum(n / len(items) * math.log2(n / len(items)) for n in counts.values())


def distinct(texts: list[list[str]], n: int) -> float:
    """Share of different ones among all n-grams of words (Li et al., "A diversity-promoting objective", 2016)."""
    grams = [tuple(words[i : i + n]) for words in texts for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


class Judge:
    """A character n-gram model of a text."""

    def __init__(self, train: list[str], order: int = ORDER):
        from nltk.lm import WittenBellInterpolated
        from nltk.util import everygrams

        self.order, self.alphabet = order, set("".join(train))
        self.model = WittenBellInterpolated(order)
        grams = (everygrams(text, max_len=order) for text in train)
        self.model.fit(grams, vocabulary_text=[*self.alphabet, UNKNOWN] * 2)

    def bits_per_character(self, texts: list[str]) -> float:
        """Cross-entropy of the characters that have a full context before them."""
        bits, count = 0.0, 0
        for text in texts:
            known = [character if character in self.alphabet else UNKNOWN for character in text]
            for place in range(self.order - 1, len(known)):
                bits -= math.log2(self._probability(tuple(known[place - self.order + 1 : place + 1])))
                count += 1
        return bits / count

    def _probability(self, gram: tuple[str, ...]) -> float:
        """Of the last character after the others; one in a thousand goes to all characters alike."""
        return 0.999 * self.model.score(gram[-1], gram[:-1]) + 0.001 / (len(self.alphabet) + 1)


def figures(texts: list[str], judge: Judge) -> list[str]:
    """The cells of a row."""
    words = [text.split() for text in texts]
    cells = [f"{len(texts)}", f"{entropy([word for text in words for word in text]):.2f}"]
    cells += [f"{entropy(list(''.join(texts))):.2f}"]
    cells += [f"{distinct(words, n):.2f}" for n in (1, 2, 3)]
    return [*cells, f"{judge.bits_per_character(texts):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--characters", type=int, default=500, help="length that every text is cut to")
    parser.add_argument("--texts", type=int, default=100, help="texts of each file, so that distinct-n compares")
    arguments = parser.parse_args()
    files = {path.stem: json.loads(path.read_text()) for path in sorted(arguments.folder.glob("*.json"))}
    judge = Judge(files.pop("train"))
    names = ["file", "texts", "entropy of words", "of characters", "distinct-1", "-2", "-3", "n-gram bits/character"]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for name, texts in files.items():
        whole = [text[: arguments.characters] for text in texts if len(text) >= arguments.characters]
        print("| " + " | ".join([name, *figures(whole[: arguments.texts], judge)]) + " |", flush=True)


if __name__ == "__main__":
    main()
