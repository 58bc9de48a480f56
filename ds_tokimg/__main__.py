"""`ds-tokimg COMMAND`, or `python -m ds_tokimg COMMAND`; also under `deepspeed --module ds_tokimg` and `torchrun -m`.

Exit code 0 on success, 2 on a mistake of the user (one message, no traceback), 1 on a failure of our own, 130 where
Ctrl-C ended it, 141 where nobody reads its output any more, as of a program that SIGPIPE ends.
"""

import getpass
import importlib
import io
import os
import signal
import sys
import tempfile
from types import FrameType

from ds_tokimg import __version__, console
from ds_tokimg.errors import UserError, nearest

COMMANDS = {
    "train": "train a model on texts",
    "evaluate": "measure bits per token of a checkpoint or export",
    "generate": "write texts with a checkpoint or export",
    "export": "turn a checkpoint into a folder that needs no DeepSpeed",
    "plan": "show what a training run would do and need, without training",
    "preview": "show the data as they will be trained",
    "chat": "talk to a model that was trained on prompts and answers",
}


INTERRUPTED, UNREAD = 130, 141  # 128 and the number of the signal, as a shell says it


def usage() -> str:
    """The help of the program: one line a command."""
    lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    head = "usage: ds-tokimg COMMAND [flags]     (COMMAND --help lists the flags)\n\ncommands:"
    return "\n".join([head, *lines])


def split_command(argv: list[str]) -> tuple[str | None, list[str]]:
    """The command and its flags, without the `--local_rank=N` that the deepspeed launcher puts in front."""
    for place, word in enumerate(argv):
        if not word.startswith("-"):
            return word, argv[place + 1 :]
        if not word.startswith(("--local_rank=", "--local-rank=")):
            break
    return None, argv


def run(argv: list[str]) -> int:
    """Run one command and return its exit code. Only that command is imported: help needs no torch."""
    command, flags = split_command(argv)
    if command in COMMANDS:
        return importlib.import_module(f"ds_tokimg.commands.{command}").main(flags)
    if "--version" in argv:
        print(f"ds-tokimg {__version__}")
    elif command is None and (not argv or {"-h", "--help"} & set(argv)):
        print(usage())
    else:
        wrong = command or argv[0]
        known = ", ".join(COMMANDS)
        raise UserError(f"unknown command {wrong!r}{nearest(wrong, COMMANDS)} (commands: {known})")
    return 0


def give_a_home() -> None:
    """A process without a home folder and a name (a container's user that is in no list of users) gets both, as the
    libraries that we use ask for them: a folder for temporary files."""
    if not os.environ.get("HOME") and os.path.expanduser("~") == "~":
        os.environ["HOME"] = os.path.join(tempfile.gettempdir(), f"ds_tokimg-{os.getuid()}")
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = f"user-{os.getuid()}"


def main(argv: list[str] | None = None) -> int:
    """One command, to its exit code: a UserError becomes one message, printed once a host whatever its number of
    ranks; so does Ctrl-C, which a training run answers itself once it trains."""
    for stream in (sys.stdout, sys.stderr):
        # What a terminal or a log cannot write (samples are any text) is shown as \u2192, not the end of the program.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    give_a_home()
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush goes nowhere
        return UNREAD
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or _CtrlC.came:  # libraries answer it with exceptions of their own
            _say_interrupted()
            return INTERRUPTED
        if not isinstance(error, UserError):
            raise
        first_of_host = os.environ.get("LOCAL_RANK", "0") == "0"
        if first_of_host if error.is_printed is None else error.is_printed:
            print(f"error: {error}", file=sys.stderr)
        return 2


class _CtrlC:
    """Of this process."""

    came = False


def _say_interrupted() -> None:
    if console.speaks():
        console.say_from_signal("interrupted", 2)


def program() -> int:
    """The entry point of a process of its own."""
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        """Like Python's own, but workers that were forked from us leave without a word, and who insists is heard. An
        import may swallow an exception, or answer it with a page of its own."""
        signal.signal(number, signal.SIG_DFL)
        _CtrlC.came = True
        if os.getpid() == owner and not console.is_starting():
            raise KeyboardInterrupt
        if os.getpid() == owner:
            _say_interrupted()
        os._exit(INTERRUPTED)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started us wants it ignored
        signal.signal(signal.SIGINT, interrupt)
    return main()


if __name__ == "__main__":
    sys.exit(program())
