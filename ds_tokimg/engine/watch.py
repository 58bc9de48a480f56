"""Ranks that watch each other: when one is gone, or hangs, the others say which and end.

A rank that waits in a collective for one that never comes cannot do anything else: its interpreter is inside a C++
call. So each rank has a thread that sends its state once a second to the first rank, over a connection that is used for
nothing else, and the first rank tells all when one

- has closed its connection without a word (killed, or its host restarted), or with the words of its failure,
- has been silent for too long (stopped, or its host is gone): 60 s, or ten times the longest silence so far,
- lives but makes no progress: 30 minutes, or ten times the longest time between two collectives so far.

Before the first step progress does not count: texts may take hours to tokenise, and a rank that does so is alive.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_tokimg.engine.launchers import Launchers
from ds_tokimg.errors import TrainingError, UserError

INTERVAL = 1.0  # seconds between two beats
# DS_TOKIMG_TIMEOUT in its place: seconds that a rank may be silent. 0: nothing is watched.
SILENT_SECONDS = 60.0
IDLE_FACTOR = 30  # a rank that is alive may take so many times as long over a step, a validation, a save
PATIENCE = 10  # times the longest so far
EXPLANATION_SECONDS = 10.0  # for the watch to find out why a collective failed
GRACE_SECONDS = 5.0  # for a rank to leave by itself once it is known that another is lost
GO_ON = "Go on from the last checkpoint with --resume latest"


class LostRank(TrainingError):
    """Another rank no longer answers."""


def allowed_silence() -> float:
    """Seconds: of the environment, or the default."""
    given = os.environ.get("DS_TOKIMG_TIMEOUT", str(SILENT_SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise UserError(f"DS_TOKIMG_TIMEOUT is {given!r}: give seconds, 0 (ranks do not watch each other) or more")
    return seconds


@dataclass
class Progress:
    """What the main thread of a rank does."""

    step: int = 0
    doing: str = "starting"
    open_ended: bool = True  # nobody knows how long it takes: preparing texts, a first step that is compiled
    entered: int = 0  # collectives so far: the rank that is behind is the one that the others wait for
    waiting: bool = False  # in one of them
    since: float = field(default_factory=time.monotonic)
    longest: float = 0.0  # seconds between two of them

    def enter(self) -> None:
        now = time.monotonic()
        if not self.open_ended:
            self.longest = max(self.longest, now - self.since)
        self.entered, self.waiting, self.since = self.entered + 1, True, now

    def leave(self) -> None:
        self.waiting, self.since = False, time.monotonic()

    @contextlib.contextmanager
    def while_doing(self, what: str) -> Iterator[None]:
        """Within: this is what the rank does."""
        before, self.doing = self.doing, what
        try:
            yield
        finally:
            self.doing = before


@dataclass
class Peer:
    """What is known of another rank."""

    state: dict[str, Any]
    silent: float = 0.0  # seconds since its last beat, as far as this process was awake
    longest_silence: float = 0.0
    end: str | None = None  # "left", "failed" or "gone"

    def heard(self, state: dict[str, Any]) -> None:
        self.longest_silence = max(self.longest_silence, self.silent)
        self.state, self.silent = state, 0.0

    @property
    def name(self) -> str:
        return f"rank {self.state['rank']} (process {self.state['pid']} on {self.state['host']})"

    @property
    def where(self) -> str:
        return f"at step {self.state['step']}, {self.state['doing']}"

    def problem(self, allowed: float) -> str | None:
        """Why this rank will not come any more, or None."""
        if self.end == "failed":
            return f"{self.name} failed {self.where}: {self.state['failure']}"
        if self.end == "gone":
            return f"{self.name} is gone, {self.where}: it was killed, or its host is down"
        if self.end is None and self.silent > max(allowed, PATIENCE * self.longest_silence):
            return f"{self.name} has been silent for {self.silent:.0f} s, {self.where}: it is stopped, or unreachable"
        return None


class Lines:
    """A connection that carries JSON objects, one a line."""

    def __init__(self, connection: socket.socket):
        self.socket, self.rest = connection, b""
        connection.settimeout(INTERVAL)

    def send(self, value: dict[str, Any]) -> None:
        """OSError where nobody is there, or nobody has taken anything for a second."""
        self.socket.sendall(json.dumps(value).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What has arrived, at least in part; None at the end."""
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *whole, self.rest = (self.rest + data).split(b"\n")
        try:
            return [json.loads(line) for line in whole]
        except ValueError:  # from somebody else, or cut by a process that was stopped
            return None


class Watch:
    """The watch of one rank, a thread from `connect` to `close`.

    progress: of the main thread. `each_beat`: called once a second. `on_orphaned`: called once when a launcher is gone.
    `lost`: what to say about a rank that will not come any more, once that is known.
    """

    def __init__(self, rank: int, world_size: int, progress: Progress):
        self.rank, self.world_size, self.progress = rank, world_size, progress
        self.allowed, self._local = allowed_silence(), os.environ.get("LOCAL_RANK", "0")
        self.each_beat: list[Callable[[], None]] = []
        self.on_orphaned: Callable[[], None] = _leave_without_launcher
        self.lost: str | None = None
        self._silent_host: str | None = None  # one whose first rank is lost, and cannot speak for it
        self._known, self._over = threading.Event(), threading.Event()
        self._failure: str | None = None
        self._peers: dict[int, Peer] = {}
        self._connections: dict[Lines, int | None] = {}  # with the rank at the other end
        self._listener: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._launchers, self._orphaned = Launchers(), False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    # ---- beginning and end ----

    def connect(self, agree: Callable[[Any], Any]) -> bool:
        """Joins the ranks; False where this one is not watched. `agree`: broadcasts a value of the first rank."""
        watched = self.allowed > 0
        if self.world_size > 1 and watched:
            place = agree(self._listen() if self.rank == 0 else None)
            watched = self.rank == 0 or self._call(*place)
        self._thread.start()
        return watched

    def close(self, failure: str | None = None) -> None:
        """Tells the others that this rank leaves, or how it failed."""
        self._failure = failure
        self._over.set()
        self._thread.join(5)

    def explanation(self) -> str | None:
        """Why a collective failed: waits a moment for what the other end of the connections shows."""
        self._known.wait(EXPLANATION_SECONDS)
        return self.lost

    def tell(self, message: str) -> None:
        """Prints why the run ends, past Python's buffers, on one rank a host where possible."""
        if self._local == "0" or self._silent_host == socket.gethostname():
            report(message)

    # ---- the thread ----

    def _run(self) -> None:
        before = time.monotonic()
        while not self._over.is_set():
            now = time.monotonic()
            # A process that was stopped itself has not listened meanwhile.
            self._beat(min(now - before, 2 * INTERVAL))
            before = now
            self._listen_for(INTERVAL)
        self._say_goodbye()

    def _beat(self, elapsed: float) -> None:
        for action in self.each_beat:
            with contextlib.suppress(OSError):
                action()
        if not self._orphaned and self._launchers.gone():
            self._orphaned = True
            self.on_orphaned()
        for peer in self._peers.values():
            peer.silent += elapsed
        self._send({"beat": self._state()})
        self._judge()

    def _judge(self) -> None:
        if self.lost is None:
            for peer in self._peers.values():
                problem = peer.problem(self.allowed)
                if problem:
                    self._know(problem, peer.state["host"] if peer.state["local"] == "0" else None)
                    break
            else:
                if self.rank == 0:
                    self._judge_progress()
        elif self._grace < time.monotonic():
            self.tell(f"error: {self.lost}. {GO_ON}")
            os._exit(1)

    def _judge_progress(self) -> None:
        """The rank that the others wait for, where nothing has moved for too long."""
        states = [self._state(), *(peer.state for peer in self._peers.values() if peer.end is None)]
        bound = max(IDLE_FACTOR * self.allowed, PATIENCE * max(state["longest"] for state in states))
        if any(state["open_ended"] or state["idle"] <= bound for state in states):
            return
        places = [(state["entered"], state["waiting"]) for state in states]
        last = states[places.index(min(places))]
        who = "no rank has made" if len(set(places)) == 1 else f"{Peer(last).name} has made no"
        self._know(f"{who} progress for {last['idle']:.0f} s, {Peer(last).where}", None)

    def _know(self, problem: str, host: str | None) -> None:
        self.lost, self._silent_host, self._grace = problem, host, time.monotonic() + GRACE_SECONDS
        self._send({"lost": problem, "host": host})
        self._known.set()

    def _state(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "rank": self.rank,
            "local": self._local,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": progress.step,
            "doing": progress.doing,
            "open_ended": progress.open_ended,
            "entered": progress.entered,
            "waiting": progress.waiting,
            "idle": time.monotonic() - progress.since,
            "longest": progress.longest,
        }

    def _say_goodbye(self) -> None:
        end = {"end": "failed", "failure": self._failure} if self._failure else {"end": "left"}
        self._send({"beat": {**self._state(), **end}})
        for lines in self._connections:
            lines.socket.close()
        if self._listener:
            self._listener.close()

    # ---- connections ----

    def _listen(self) -> tuple[str, int, str]:
        """The first rank's address, port and password."""
        self._listener = socket.create_server(("", 0), backlog=self.world_size)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._password = secrets.token_hex(8)
        return _own_address(), self._listener.getsockname()[1], self._password

    def _call(self, address: str, port: int, password: str) -> bool:
        try:
            lines = Lines(socket.create_connection((address, port), timeout=10))
            lines.send({"password": password, "beat": self._state()})
        except OSError as error:
            print(f"rank {self.rank} cannot be watched: {address}:{port}: {error.strerror or error}", file=sys.stderr)
            return False
        self._add(lines, 0)
        return True

    def _add(self, lines: Lines, rank: int | None) -> None:
        self._connections[lines] = rank
        self._selector.register(lines.socket, selectors.EVENT_READ, lines)

    def _send(self, value: dict[str, Any]) -> None:
        for lines in self._connections:
            with contextlib.suppress(OSError):  # who has gone is found where it is listened to
                lines.send(value)

    def _listen_for(self, seconds: float) -> None:
        """Takes in what arrives within the time."""
        end = time.monotonic() + seconds
        while not self._over.is_set() and (left := end - time.monotonic()) > 0:
            for key, _ in self._selector.select(min(left, 0.1)):
                if key.data is not None:
                    self._take(key.data)
                elif self._listener is not None:
                    self._add(Lines(self._listener.accept()[0]), None)

    def _take(self, lines: Lines) -> None:
        values = lines.receive()
        for value in values or ():
            if self.rank == 0 and self._connections[lines] is None:
                if value.get("password") != self._password:
                    values = None
                    break
                self._connections[lines] = value["beat"]["rank"]
            self._hear(lines, value)
        if values is None:
            rank = self._connections.pop(lines)
            self._selector.unregister(lines.socket)
            lines.socket.close()
            peer = self._peers.get(rank) if rank is not None else None
            if peer and peer.end is None:
                peer.end = "gone"

    def _hear(self, lines: Lines, value: dict[str, Any]) -> None:
        if "lost" in value and self.lost is None:
            self._know(value["lost"], value["host"])
        if "beat" in value:
            state = value["beat"]
            peer = self._peers.setdefault(state["rank"], Peer(state))
            peer.heard(state)
            peer.end = state.get("end")


def report(line: str) -> None:
    """On the standard error, past Python's buffers, and where torchrun looks for the reason, which it shows last."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            words = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": words}), encoding="utf-8")


def _leave_without_launcher() -> None:
    report("the launcher of this rank has ended, before the first step: nothing to save")
    os._exit(1)


def _own_address() -> str:
    """The address of this host as the others reach it: that of the interface towards the meeting point."""
    meeting = os.environ["MASTER_ADDR"]
    with contextlib.suppress(OSError):
        family, _, _, _, place = socket.getaddrinfo(meeting, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            own = probe.getsockname()[0]
        if own != place[0] and not own.startswith("127.") and own != "::1":
            return own
    return meeting
