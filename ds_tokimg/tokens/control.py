"""Control tokens: those that mean something beyond their characters, and how to keep their names in a text as text.

`<|im_end|>` in someone's words is ten characters, in a chat template the end of a turn. What goes into a template is
therefore guarded first: a name in it gets a stand-in. A text with stand-ins is then spelt by a copy of the tokenizer in
which control tokens have other names, which no text can hold; all else is as in the tokenizer itself.
"""

from __future__ import annotations

import json
import re
import secrets
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ds_tokimg.errors import UserError

if TYPE_CHECKING:
    from ds_tokimg.tokens.tokenizer import Tokenizer

# New in every process, so that no text can hold them: what stands for the name of a control token that is text, and
# for one that is a control token.
_GUARD, _CONTROL = secrets.token_hex(12), secrets.token_hex(12)
_SECRET = re.compile(f"{_GUARD}x(\\d+)x")


def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Names and ids of the tokens that mean something beyond their characters: the end of a text, a chat's turns, …

    The one for unknown words is none of them, unless it is also the end of a text.
    """
    known: Any = tokenizer
    return _control_tokens(known, len(tokenizer), tokenizer.eos_token)


@lru_cache(maxsize=4)
def _control_tokens(tokenizer: Any, _number: int, _end: str) -> dict[str, int]:
    """Found once for a tokenizer, until it gets others."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    tokens = {str(token): number for number, token in added.items() if token.special}
    tokens |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for unknown in (tokenizer.unk_token, getattr(getattr(backend, "model", None), "unk_token", None)):
        if unknown is not None and unknown != tokenizer.eos_token:
            tokens.pop(unknown, None)
    return tokens


def guarded(tokenizer: Tokenizer, content: str) -> str:
    """What goes into a chat template as someone's words: names of control tokens in it stay text when the whole is
    encoded with `parse_special`. Unchanged where it holds none."""
    names = list(control_tokens(tokenizer))
    return _pattern(tuple(names)).sub(lambda match: _secret(names.index(match[0])), content) if names else content


def unguarded(tokenizer: Tokenizer, text: str) -> str:
    """A text with `guarded` parts as people read it."""
    if _GUARD not in text:
        return text
    names = list(control_tokens(tokenizer))
    return _SECRET.sub(lambda match: names[int(match[1])], text)


def _secret(number: int) -> str:
    return f"{_GUARD}x{number}x"


@lru_cache(maxsize=8)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))


def is_guarded(text: str) -> bool:
    """Whether the text has a `guarded` part that is not as its author wrote it."""
    return _GUARD in text


def name_of(tokenizer: Tokenizer) -> str:
    """For messages."""
    return repr(tokenizer.name_or_path or "(trained here)")


def spell(tokenizer: Tokenizer, backend: Any, text: str, plain: bool = False) -> list[int]:
    """The ids of one text by a copy of the tokenizer whose control tokens go by names that no text can hold.

    backend: its Rust tokenizer. `plain`: nothing in the text is a control token; otherwise what is not `guarded` is.
    Raises UserError when there is no such tokenizer.
    """
    names = tuple(control_tokens(tokenizer))
    if backend is None:
        raise UserError(
            f"the tokenizer {name_of(tokenizer)} cannot keep the name of a control token as text, in "
            f"{unguarded(tokenizer, text)[:60]!r}: leave that text out, or use a tokenizer with a tokenizer.json"
        )
    if not plain:
        marked = _pattern(names).sub(lambda match: f"{_CONTROL}x{names.index(match[0])}x", text)
        text = unguarded(tokenizer, marked)
    return list(_renamed(backend.to_str(), names).encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=2)
def _renamed(definition: str, names: tuple[str, ...]) -> Any:
    """A tokenizer like the one that is defined, in which control tokens are called by `_CONTROL` and their number."""
    from tokenizers import Tokenizer

    new = {name: f"{_CONTROL}x{number}x" for number, name in enumerate(names)}
    content = json.loads(definition)
    model = content["model"]
    for token in content["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    if model.get("unk_token") in new:  # where it is also the end of a text
        model["unk_token"] = new[model["unk_token"]]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        pairs = ((pair, pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"])
        model["merges"] = [pair for pair, parts in pairs if not {"".join(parts), *parts} & new.keys()]
    content["post_processor"] = None  # it adds control tokens, which is never asked for
    return Tokenizer.from_str(json.dumps(content))
