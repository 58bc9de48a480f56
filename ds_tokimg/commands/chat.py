"""python -m ds_tokimg chat: a model that was trained on prompts and answers, in the terminal.

A model that was trained in a chat template (`--use_chat_template`) is shown the whole conversation; another answers
every line by itself. `/help` lists commands. An empty line, Ctrl-D or Ctrl-C ends it (Ctrl-C while an answer is
written ends the answer alone); lines may also come from a pipe.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ds_tokimg.commands.flags import add_draws, answers_prompts, parser_with_model, sampling_options
from ds_tokimg.console import starting
from ds_tokimg.errors import UserError, nearest
from ds_tokimg.inference.options import SamplingOptions

if TYPE_CHECKING:
    from ds_tokimg.inference.loading import TrainedModel

HELP = """\
/reset   forget the conversation so far
/retry   answer the last line again, otherwise
/help    these commands
/quit    end, as an empty line, Ctrl-D or Ctrl-C do
A line that is to begin with a slash begins with two."""

COMMANDS = [line.split()[0] for line in HELP.splitlines()[:-1]]


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    options = sampling_options(arguments)
    _check_answers(arguments.checkpoint, answers_prompts(arguments.checkpoint))
    with starting():
        from ds_tokimg.inference import fitness
        from ds_tokimg.inference.loading import load_trained

        trained = load_trained(arguments.checkpoint, arguments.weights, arguments.device)
    _check_answers(arguments.checkpoint, trained.format.enable_condition)
    fitness.check(trained, options)
    chat = _Chat(trained, options, remembers=trained.format.use_chat_template and not arguments.no_history)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print(f"{chat.introduction} /help lists commands; an empty one ends.")
    _talk(chat, at_terminal)
    return 0


def _check_answers(checkpoint: str, answers: bool | None) -> None:
    """UserError for a model that was trained without conditions. None: nobody knows yet."""
    if answers is False:
        raise UserError(
            f"{checkpoint} was trained without --enable_condition: it continues texts and answers nothing; "
            f"use ds-tokimg generate --checkpoint {checkpoint} --prompt TEXT"
        )


def _parser() -> argparse.ArgumentParser:
    trained = "a checkpoint, a run's folder (its best one) or an export, trained with --enable_condition"
    parser = parser_with_model("chat", __doc__, trained)
    add = parser.add_argument
    add("--max_new_tokens", type=int, metavar="N", help="length of an answer at most (default: as in training)")
    add_draws(parser)
    add("--num_inference_steps", type=int, metavar="N", help="network evaluations, of every block (as in generate)")
    add("--guidance_scale", type=float, default=1.0, metavar="S", help="above 1 exaggerates the prompt (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="of the first answer, one more each (default: 0)")
    add("--no_history", action="store_true", help="answer every line by itself, also in a chat template")
    return parser


def _talk(chat: _Chat, at_terminal: bool) -> None:
    """Until the lines end, or Ctrl-C; at a terminal, Ctrl-C in an answer ends the answer alone."""
    try:
        for line in _lines("> " if at_terminal else ""):
            try:
                if not chat.hear(line):
                    return
            except KeyboardInterrupt:
                if not at_terminal:
                    raise
                print()
    except KeyboardInterrupt:
        print()


def _lines(invitation: str) -> Iterator[str]:
    """What is typed, up to an empty line or the end of the input."""
    with contextlib.suppress(ImportError):  # where there is one, lines can be edited and called back
        import readline  # noqa: F401
    while True:
        try:
            line = input(invitation)
            line.encode()
        except EOFError:
            if invitation:
                print()
            return
        except UnicodeError:
            raise UserError("a line is not UTF-8: chat reads text") from None
        if not line.strip():
            return
        yield line


class _Chat:
    """A conversation.

    Args:
        remembers: every answer is given to the whole conversation, not to its last line alone.
    """

    def __init__(self, trained: TrainedModel, options: SamplingOptions, remembers: bool):
        self.trained, self.options, self.remembers = trained, options, remembers
        self.messages: list[tuple[str, str]] = []
        self.last_line: str | None = None

    @property
    def introduction(self) -> str:
        if self.remembers:
            return "Every line goes on with the conversation."
        why = (
            "--no_history"
            if self.trained.format.use_chat_template
            else "this model was trained without a chat template"
        )
        return f"Every line is answered by itself ({why})."

    def hear(self, line: str) -> bool:
        """Answers a line, or obeys a command; whether the conversation goes on."""
        command = line.strip()
        if not command.startswith("/") or command.startswith("//"):
            self._answer(line.replace("//", "/", 1) if command.startswith("//") else line)
        elif command == "/quit":
            return False
        elif command == "/reset":
            self.messages, self.last_line = [], None
            self._say("forgotten")
        elif command == "/retry" and self.last_line is not None:
            if self.messages[-2:-1] == [("user", self.last_line)]:
                del self.messages[-2:]
            self._answer(self.last_line)
        elif command == "/retry":
            self._say("there is nothing to answer again yet")
        elif command == "/help":
            self._say(HELP)
        else:
            word = command.split()[0]
            hint = nearest(word, COMMANDS) or "; /help lists those that there are"
            self._say(f"unknown command {word}{hint} (a line that is to begin with a slash begins with two)")
        return True

    def _answer(self, line: str) -> None:
        """Prints the answer while it is written. An answer that is interrupted is not remembered, nor its line."""
        from ds_tokimg.inference.texts import TextStream

        options, self.last_line = self.options, line
        # Who asks twice gets another answer.
        self.options = dataclasses.replace(options, seed=options.seed + 1)
        stream = TextStream(self.trained, self._conversation(line) if self.remembers else line, options)
        for piece in stream:
            print(piece, end="", flush=True)
        print(flush=True)
        if self.remembers:
            self.messages += [("user", line), ("assistant", stream.result["text"])]

    def _conversation(self, line: str) -> list[tuple[str, str]]:
        """What the model is shown: the conversation with this line, without its oldest pairs where it is too long."""
        from ds_tokimg.tokens.tokenizer import encode_conversation

        room, dropped = self.trained.format.max_tokens, 0
        while self.messages:
            if len(encode_conversation(self.trained.tokenizer, [*self.messages, ("user", line)])) <= room:
                break
            self.messages, dropped = self.messages[2:], dropped + 1
        if dropped:
            self._say(f"the conversation is longer than {room:,} tokens: its oldest {dropped} pair(s) are forgotten")
        return [*self.messages, ("user", line)]

    def _say(self, text: str) -> None:
        """What is no answer."""
        print(text, file=sys.stderr, flush=True)
