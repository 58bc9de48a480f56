"""Sources: which files, or which Hugging Face data set, a data path means, and what of a folder is left out."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ds_tokimg.data.files import COMPRESSIONS, FORMAT_HELP, FORMATS, Span, format_of
from ds_tokimg.data.readers import grouped, read_span, spans_of
from ds_tokimg.data.records import AS_USUAL, ReadOptions, Record, Tally, is_blank
from ds_tokimg.data.tables import columns_of, records_of_rows
from ds_tokimg.errors import UserError

# What the files of a cloned repository, and the splits of a hub data set, are for; the words are those of `datasets`.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SPLIT = re.compile(rf"(?:^|[-_./ ])({'|'.join(_SPLITS)})(?=[-_./ 0-9]|$)", re.IGNORECASE)
# Files about the texts, which are no texts themselves.
_ABOUT = ("readme", "license", "licence", "copying", "notice", "changelog", "contributing")
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_WEIGHT = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")
_ROWS_PER_GROUP = 2000


class MissingTexts(UserError):
    """There is nothing at a data path."""


@dataclass
class Source:
    """A corpus as found: groups of spans, each about as much work as the next.

    fingerprint: changes whenever the files do. num_bytes: about, of text. rows: the `datasets.Dataset` when the corpus
    comes from the hub. validation: the texts that the corpus itself sets apart for validation. weight: share of the
    images of an epoch, in proportion to those of other sources; None for as many as there are. notes: what was left
    out, and what was taken for what. sizes: bytes of each group, about.
    """

    name: str
    groups: list[list[Span]]
    fingerprint: str
    num_bytes: int
    options: ReadOptions = AS_USUAL
    rows: Any = field(default=None, repr=False)
    validation: Source | None = None
    weight: float | None = None
    notes: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list, repr=False)

    def read(self, group: int, tally: Tally | None = None) -> Iterator[Record]:
        """The records of one group, in order. Raises UserError for a bad one, unless the tally counts them."""
        tally = tally or Tally(self.options.skip_bad_records)
        for span in self.groups[group]:
            yield from read_span(span, self.options, tally) if self.rows is None else self._read_rows(span, tally)

    def _read_rows(self, span: Span, tally: Tally) -> Iterator[Record]:
        columns = columns_of(self.name, self.rows.column_names, self.options)
        batch = self.rows.select_columns(columns)[span.start : span.stop]
        rows = (dict(zip(columns, row, strict=True)) for row in zip(*batch.values(), strict=True))
        records = records_of_rows(enumerate(rows, span.start + 1), self.name, self.options, tally)
        return (record for record in records if not is_blank(record))


def find_all(data_paths: str | Path | Sequence[str | Path], options: ReadOptions = AS_USUAL) -> list[Source]:
    """The sources of one data path or of several, each `PATH` or `PATH:WEIGHT`.

    Raises UserError when there is nothing at one of them, or when only some of them have a weight.
    """
    paths = [data_paths] if isinstance(data_paths, str | Path) else list(data_paths)
    if not paths:
        raise UserError("no data path is given")
    weighted = [weight_of(str(path)) for path in paths]
    given = [weight is not None for _, weight in weighted]
    if any(given) and not all(given):
        bare = ", ".join(path for path, weight in weighted if weight is None)
        raise UserError(f"some data paths have a weight and others have none ({bare}): give one to each, or to none")
    return [replace(find(path, options), weight=weight) for path, weight in weighted]


def weight_of(path: str) -> tuple[str, float | None]:
    """`PATH:WEIGHT` in its parts; a file or folder that is really called so has no weight."""
    match = _WEIGHT.fullmatch(path)
    if match is None or Path(path).expanduser().exists():
        return path, None
    if float(match[2]) <= 0:
        raise UserError(f"{path}: the weight must be above 0; leave the path out if it should not be read")
    return match[1], float(match[2])


def find(data_path: str | Path, options: ReadOptions = AS_USUAL) -> Source:
    """What there is to read at `data_path`: a file, a folder, or else a Hugging Face data set name.

    Raises UserError when there is nothing.
    """
    path = Path(data_path).expanduser()
    if not path.exists():
        return _find_on_hub(str(data_path), options)
    if path.is_dir():
        return _find_in_folder(str(data_path), path, options)
    if not format_of(path)[0]:
        raise UserError(f"{path}: cannot read {path.suffix or 'a file without suffix'!r}; use {FORMAT_HELP}")
    return _of_files(str(data_path), [path], options)


def _of_files(name: str, files: list[Path], options: ReadOptions) -> Source:
    for file in files:
        _check_readable(file)
    spans = [sized for file in files for sized in spans_of(file, options)]
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    total = sum(size * (4 if format_of(path)[1] else 1) for path, size, _ in stamps)
    groups, size_of = grouped(spans), dict(spans)
    sizes = [sum(size_of[span] for span in group) for group in groups]
    return Source(name, groups, _digest(stamps), total, options, sizes=sizes)


def _check_readable(file: Path) -> None:
    try:
        with open(file, "rb"):
            pass
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def _digest(parts: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


# ---- folders ----


def _find_in_folder(name: str, folder: Path, options: ReadOptions) -> Source:
    """The files of a folder, sorted by path, hidden ones left out. What else is left out is told in a note.

    Where names set texts apart for training and others for validation or tests, as in a repository of the hub, each
    is taken for what it is called.
    """
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not _is_hidden(f.relative_to(folder)))
    texts = [file for file in files if _is_text(file)]
    others = [file for file in files if not _is_text(file)]
    if not texts:
        found = f"; it holds {_listing(others, folder)}" if others else ""
        raise UserError(f"the folder {folder} holds no text: {FORMAT_HELP}{found}")
    notes = [f"{name}: not read: {_listing(others, folder)}"] if others else []
    splits = [split_of(file.relative_to(folder)) for file in texts]
    if "train" not in splits or not {"validation", "test"} & set(splits):
        return replace(_of_files(name, texts, options), notes=notes)

    def of(split: str | None) -> list[Path]:
        return [file for file, its in zip(texts, splits, strict=True) if its == split]

    train, validation, rest = of("train"), of("validation"), of("test") + of(None)
    notes.append(f"{name}: trains on its train split ({_listing(train, folder)})")
    if validation:
        notes.append(f"{name}: its validation split is used for validation ({_listing(validation, folder)})")
    if rest:
        notes.append(f"{name}: neither trained nor validated on: {_listing(rest, folder)}")
    held_out = _of_files(f"{name} (validation split)", validation, options) if validation else None
    return replace(_of_files(name, train, options), validation=held_out, notes=notes)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_text(file: Path) -> bool:
    name = file.name.lower()
    return bool(format_of(file)[0]) and name not in _METADATA and name.split(".")[0] not in _ABOUT


def split_of(path: Path) -> str | None:
    """ "train", "validation" or "test", from the first word in a path that says so."""
    match = _SPLIT.search(_without_suffixes(path))
    return _SPLITS[match[1].lower()] if match else None


def _without_suffixes(path: Path) -> str:
    text = path.as_posix()
    for _ in range(2):
        suffix = Path(text).suffix.lower()
        text = text[: len(text) - len(suffix)] if suffix in (*FORMATS, *COMPRESSIONS) else text
    return text


def _listing(files: Iterable[Path], folder: Path) -> str:
    """`3 .zip (a.zip, …), 1 .py (x.py)`: how many files of each kind there are, with an example."""
    files = list(files)
    kinds = Counter("".join(file.suffixes[-1:]).lower() or "without suffix" for file in files)
    parts = []
    for kind, count in kinds.most_common(6):
        example = next(f for f in files if ("".join(f.suffixes[-1:]).lower() or "without suffix") == kind)
        more = ", …" if count > 1 else ""
        parts.append(f"{count:,} {kind} ({example.relative_to(folder).as_posix()}{more})")
    rest = len(files) - sum(count for _, count in kinds.most_common(6))
    return ", ".join(parts) + (f" and {rest:,} more" if rest else "")


# ---- the hub ----


def _find_on_hub(name: str, options: ReadOptions) -> Source:
    """`owner/name` or `owner/name:configuration`: its train split, and its validation split for validation."""
    if format_of(name)[0] or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingTexts(f"no such file or folder: {name}")
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        splits = dict(datasets.load_dataset(repository, configuration or None))
    except Exception as error:  # network, missing repository, unknown configuration: each library its own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise MissingTexts(
            f"{name!r} is no file or folder here, and cannot be loaded as a Hugging Face data set: {reason}"
        ) from error
    kinds = {_SPLITS.get(split, split): split for split in reversed(splits)}
    if "train" not in kinds:
        raise UserError(f"the data set {name} has no train split; it has {', '.join(splits)}")
    source = _of_rows(name, splits[kinds["train"]], options)
    held_out = kinds.get("validation")
    if held_out:
        source.validation = _of_rows(f"{name} (validation split)", splits[held_out], options)
        source.notes.append(f"{name}: its split {held_out!r} ({len(splits[held_out]):,} rows) is used for validation")
    rest = [split for split in splits if split not in (kinds["train"], held_out)]
    if rest:
        source.notes.append(f"{name}: neither trained nor validated on: the splits {', '.join(rest)}")
    return source


def _of_rows(name: str, rows: Any, options: ReadOptions) -> Source:
    columns_of(name, rows.column_names, options)
    starts = range(0, len(rows), _ROWS_PER_GROUP)
    groups = [[Span(name, i, min(i + _ROWS_PER_GROUP, len(rows)))] for i in starts]
    size = rows.dataset_size or 0
    sizes = [size // len(groups)] * len(groups)
    return Source(name, groups, _digest([name, rows._fingerprint]), size, options, rows, sizes=sizes)
