"""What a run is trained and validated on, recognised by content, wherever it lies: the file data.json of a run.

The fingerprints say whether a run goes on with the same texts. Its training texts are known by their hashes, so that a
measurement can say how many of its texts the model has been trained on.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ds_tokimg.data.corpus import Fingerprint
from ds_tokimg.data.dataset import TokenImageDataset
from ds_tokimg.errors import UserError, value_problems
from ds_tokimg.settings import files, formats

# Training texts that a run knows, each: 8 bytes. Of more it knows those with the smallest hashes, which are a sample.
MOST_KNOWN = 1 << 15

_KEYS = {
    "training": list[str],
    "validation": list[str],
    "weights": list[float],
    "from_start": bool,
    "all_known": bool,
    "known": str,
}


def file_of(folder: Path) -> Path:
    """The data.json that belongs to a checkpoint or an export."""
    return files.file_of(folder, formats.DATA)


@dataclass(frozen=True)
class Known:
    """Texts by their hashes, uint64, ascending: all of them, or the smallest ones."""

    hashes: np.ndarray
    all: bool

    @classmethod
    def of(cls, hashes: np.ndarray) -> Known:
        """hashes: of all texts, in any order, uint64 [n], n > 0."""
        few = min(len(hashes), 4 * MOST_KNOWN)  # a text may occur several times
        different = np.unique(np.partition(hashes, few - 1)[:few])
        return cls(different[:MOST_KNOWN], few == len(hashes) and len(different) <= MOST_KNOWN)

    def joined(self, other: Known) -> Known:
        """Those of both."""
        union = np.unique(np.concatenate([self.hashes, other.hashes]))
        limits = [known.hashes[-1] for known in (self, other) if not known.all]  # beyond its own, one knows nothing
        if limits:
            union = union[union <= min(limits)]
        return Known(union[:MOST_KNOWN], not limits and len(union) <= MOST_KNOWN)

    def counts(self, hashes: np.ndarray) -> bool:
        """Whether all of other texts are within what is known, so that `count` does not estimate."""
        return self.all or not (hashes > self.hashes[-1]).any()

    def count(self, hashes: np.ndarray) -> int:
        """How many of other texts are among these: counted, and beyond the largest hash that is known, estimated from
        those that are within."""
        found = int(np.isin(hashes, self.hashes).sum())
        if self.all:
            return found
        first, last = self.hashes[0], self.hashes[-1]
        within = int(((hashes >= first) & (hashes <= last)).sum())
        beyond = int((hashes > last).sum())
        return found + round(beyond * found / within) if within else found


@dataclass(frozen=True)
class RunTexts:
    """The texts of a run.

    weights: of its paths, as shares; empty without. known: its training texts, and those of the weights that it began
        with. from_start: whether that is all that the model has been trained on; else it began with weights that do not
        say.
    """

    training: Fingerprint
    validation: Fingerprint
    weights: tuple[float, ...]
    known: Known
    from_start: bool = True

    @classmethod
    def of(cls, train_set: TokenImageDataset, eval_set: TokenImageDataset) -> RunTexts:
        weights = np.array(train_set.weights) / max(sum(train_set.weights), 1e-9)
        known = Known.of(train_set.hashes)
        training, validation = train_set.corpus.fingerprint, eval_set.corpus.fingerprint
        whole = train_set.corpus.share == 1  # of a stream only those of its sample are known
        known = known if whole else replace(known, all=False)
        return cls(training, validation, tuple(weights.round(9).tolist()), known, from_start=whole)

    def after(self, before: RunTexts | None) -> RunTexts:
        """Of a model that is trained on with these: it knows the earlier ones too. None: they are not known."""
        if before is None:
            return replace(self, from_start=False)
        known = before.known.joined(self.known)
        return replace(self, known=known, from_start=before.from_start and self.from_start)

    def count_in_training(self, hashes: np.ndarray) -> int | None:
        """How many of other texts the model was trained on, see `Known.count`; None where none is known to be, and not
        all is known."""
        return self.known.count(hashes) or (0 if self.from_start else None)

    def changes(self, before: RunTexts) -> list[str]:
        """What differs from the texts that the run had, a sentence each."""
        changes = []
        for what in ("training", "validation"):
            now, then = getattr(self, what), getattr(before, what)
            if now.texts != then.texts:
                changes.append(f"the {what} texts, or their order, are others")
            elif now.tokens != then.tokens:
                changes.append(f"the {what} texts are the same, but become other tokens than they did")
        if changes[1:] and self.training == self.validation and before.training == before.validation:
            del changes[1:]  # one corpus, a part of it held out
        if self.weights != before.weights:
            shares = (" ".join(f"{share:g}" for share in texts.weights) or "none" for texts in (self, before))
            changes.append("the weights of the data paths are {}; the run has {}".format(*shares))
        return changes

    def description(self) -> str:
        """As JSON: the content of data.json."""
        values: dict = {"training": self.training, "validation": self.validation, "weights": self.weights}
        known = base64.b64encode(self.known.hashes.astype("<u8").tobytes()).decode()
        values |= {"from_start": self.from_start, "all_known": self.known.all, "known": known}
        return json.dumps({"format": formats.FORMAT, **values}, indent=1)

    @classmethod
    def load(cls, path: Path) -> RunTexts | None:
        """Of a data.json; None where there is none (versions before this file wrote none). UserError for a bad one."""
        if not path.is_file():
            return None
        values = formats.read(path, formats.DATA)
        formats.refuse(path, value_problems(values, _KEYS))
        try:
            hashes = np.frombuffer(base64.b64decode(values["known"], validate=True), dtype="<u8")
            training, validation = (Fingerprint(*values[what]) for what in ("training", "validation"))
        except (binascii.Error, ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged: {error}") from None
        formats.refuse(path, [] if len(hashes) else ["it knows no text"])
        known = Known(hashes.astype(np.uint64), values["all_known"])
        return cls(training, validation, tuple(values["weights"]), known, values["from_start"])
