"""Records: what a line, a JSON value or a table row has to be, and what is done about a bad one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ds_tokimg.choices import DOCUMENTS
from ds_tokimg.errors import UserError

ROLES = ("system", "user", "assistant", "tool", "developer")

# A text file whose lines are cut at 70 to 80 characters has most of its lines shorter than this, and ending anywhere.
_LINE_OF_PROSE = 80
_ENDS = tuple(".!?…:;\"'”’»)]}。！？|")


@dataclass(frozen=True)
class ReadOptions:
    """How files become records.

    text_key: the key or column that holds a record's text, in place of "text". It wins over all other keys.
    document: what one text of a plain text file is: a line, a paragraph (blank lines part them) or the file; None for
        what suits the format: a line of a .txt, the whole of a .md.
    skip_bad_records: leave bad records out and count them; otherwise the first one is an error.
    """

    text_key: str | None = None
    document: str | None = None
    skip_bad_records: bool = False

    def __post_init__(self) -> None:
        if self.document not in (None, *DOCUMENTS):
            raise UserError(f"unknown document {self.document!r}; available: {', '.join(DOCUMENTS)}")
        if self.text_key == "":
            raise UserError("text_key is empty: name the key or column that holds the text, or leave it out")

    @property
    def fields(self) -> tuple[str, ...]:
        """The keys that are looked at in a record, the most important first."""
        return (self.text_key or "text", "prompt", "answer", "messages")

    @property
    def format_help(self) -> str:
        return (
            f'a record is a string, {{"{self.text_key or "text"}": ...}}, {{"prompt": ..., "answer": ...}} or '
            '{"messages": [{"role": ..., "content": ...}, ...]}'
        )


AS_USUAL = ReadOptions()


@dataclass(frozen=True)
class Conversation:
    """Messages as (role, content), the last one by the assistant."""

    messages: tuple[tuple[str, str], ...]

    @property
    def prompt(self) -> str:
        """What comes before the last answer, a message a line."""
        return "\n".join(content for _, content in self.messages[:-1])

    @property
    def answer(self) -> str:
        return self.messages[-1][1]


# A plain text, a (prompt, answer) pair, or a conversation.
Record = str | tuple[str, str] | Conversation


def parts_of(record: Record) -> tuple[str, str]:
    """(prompt, scored text), without a chat template: the prompt of a plain text is empty."""
    if isinstance(record, str):
        return "", record
    return (record.prompt, record.answer) if isinstance(record, Conversation) else record


def joined(record: Record) -> str:
    """A record as one text: the answer begins a line of its own."""
    if isinstance(record, str):
        return record
    prompt, answer = parts_of(record)
    return prompt + answer if prompt.endswith("\n") else f"{prompt}\n{answer}"


def to_record(item: Any, options: ReadOptions) -> Record:
    """A parsed JSON value or table row -> a record. A field that is null counts as missing; where all the fields that
    are there are null, the record is an empty text. Raises ValueError with what is wrong."""
    if isinstance(item, str):
        return _checked("a record", item)
    if not isinstance(item, dict):
        raise ValueError(f"{options.format_help}; this one is {_kind(item)}")
    text, *_ = fields = options.fields
    present = [name for name in fields if item.get(name) is not None]
    if present == [text] or (options.text_key and text in present):
        return _checked(text, item[text])
    if present == ["prompt", "answer"]:
        return _checked("prompt", item["prompt"]), _checked("answer", item["answer"])
    if present == ["messages"]:
        return _conversation(item["messages"])
    if len(present) > 1:
        raise ValueError(f'has both "{present[0]}" and "{present[-1]}"; {options.format_help}')
    if present:
        missing = "answer" if present == ["prompt"] else "prompt"
        raise ValueError(f'has "{present[0]}" but no "{missing}"; {options.format_help}')
    if any(name in item for name in fields):
        return ""
    keys = ", ".join(map(repr, list(item)[:8])) or "none"
    raise ValueError(f"{options.format_help}; this one has the keys: {keys}")


def _conversation(messages: Any) -> Conversation:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError('"messages" must be a list of {"role": ..., "content": ...}')
    found = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f'a message has the role {role!r}; a "role" is one of {", ".join(ROLES)}')
        found.append((role, _checked("content", content)))
    if not found or found[-1][0] != "assistant":
        raise ValueError('the last of the "messages" must have the role "assistant": its content is what is learnt')
    return Conversation(tuple(found))


def _checked(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be a string, not {_kind(value)}')
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no character
            raise ValueError(f'"{name}" holds {value[error.start]!a}, which is not a valid character') from error
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def is_blank(record: Record) -> bool:
    """Whether there is nothing to learn: a blank text, or a blank answer."""
    scored = parts_of(record)[1]
    return not scored or scored.isspace()


@dataclass
class Tally:
    """What reading came upon that a person should know; sums over the parts of a corpus.

    bad: records left out. example: one of them, with its problem. lines: texts that were a line of a text file.
    broken_off: those of them that are shorter than a line of prose and end without an end of sentence.
    lost: of the texts that were tried, those that the tokenizer does not give back. lost_example: what became of one.
    """

    skip_bad: bool = False
    bad: int = 0
    example: str = ""
    lines: int = 0
    broken_off: int = 0
    lost: int = 0
    lost_example: str = ""

    def reject(self, where: Callable[[], str], problem: str) -> None:
        """A bad record: counts it, or raises UserError. `where` names its file and line: that takes time to find."""
        if not self.skip_bad:
            raise UserError(f"{where()}: {problem} (--skip_bad_records leaves bad records out)")
        self.bad += 1
        self.example = self.example or f"{where()}: {problem}"

    def count_lines(self, lines: list[str]) -> None:
        """Texts that are lines of a text file."""
        self.lines += len(lines)
        self.broken_off += sum(len(line) < _LINE_OF_PROSE and not line.rstrip().endswith(_ENDS) for line in lines)

    def add(self, other: Tally) -> None:
        self.bad, self.example = self.bad + other.bad, self.example or other.example
        self.lines, self.broken_off = self.lines + other.lines, self.broken_off + other.broken_off
        self.lost, self.lost_example = self.lost + other.lost, self.lost_example or other.lost_example

    def notes(self, name: str) -> list[str]:
        """One line for each thing to know about the corpus `name`."""
        notes = []
        if self.bad:
            notes.append(f"{name}: {self.bad:,} bad record(s) left out, for example: {self.example}")
        if self.lines >= 20 and self.broken_off > self.lines / 2:
            notes.append(
                f"{name}: {self.broken_off:,} of {self.lines:,} texts are lines of less than {_LINE_OF_PROSE} "
                "characters that end within a sentence; if line breaks only wrap the text there, give --document "
                "paragraph (blank lines part the texts) or file"
            )
        if self.lost:
            notes.append(
                f"{name}: the tokenizer loses text ({self.lost_example}): bits per byte would not pay for what is "
                "lost, and are not given"
            )
        return notes
