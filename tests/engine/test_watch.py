"""Ranks that watch each other: one that is killed, stopped, stuck or fails is named by the others, who end."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time

import pytest

from ds_tokimg.engine import watch
from ds_tokimg.engine.launchers import SCRIPT
from ds_tokimg.engine.watch import Peer, Progress
from tests.support.distributed import run_ranks, start_ranks

# Three ranks in one: processes with a watch and nothing else, which wait where a collective would. Without torch.
RANKS = """
import os, signal, sys, time
from ds_tokimg.engine import watch

watch.INTERVAL, watch.GRACE_SECONDS, watch.IDLE_FACTOR, watch.PATIENCE = 0.2, 1.0, 0.5, 1
kind, victim = sys.argv[1], int(sys.argv[2])
source, sink = os.pipe()

def rank_main(rank):
    def agree(place):
        if rank == 0:
            for _ in range(2):
                os.write(sink, repr(place).ljust(100).encode())
            return place
        return eval(os.read(source, 100))

    os.environ.update(LOCAL_RANK=str(rank), DS_TOKIMG_TIMEOUT="4", MASTER_ADDR="127.0.0.1")
    progress = watch.Progress(step=7, doing="training", open_ended=False)
    own = watch.Watch(rank, 3, progress)
    assert own.connect(agree)
    time.sleep(1)
    if rank == victim:
        if kind == "killed" or kind == "stopped":
            os.kill(os.getpid(), signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        if kind == "failed":
            own.close("the disk of this host is full")
            os._exit(1)
        time.sleep(60)
    progress.enter()
    time.sleep(60)

ranks = [os.fork() or (rank_main(rank), os._exit(9)) for rank in range(3)]
codes = [os.waitstatus_to_exitcode(os.waitpid(ranks[rank], 0)[1]) for rank in range(3) if rank != victim]
if kind in ("stopped", "stuck"):
    os.kill(ranks[victim], signal.SIGKILL)
print(codes)
"""
WORDS = {
    "killed": "is gone, at step 7, training: it was killed, or its host is down",
    "failed": "failed at step 7, training: the disk of this host is full",
    "stopped": r"has been silent for \d+ s, at step 7, training: it is stopped, or unreachable",
    "stuck": r"has made no progress for \d+ s, at step 7, training",
}


@pytest.mark.parametrize(
    "kind, victim", [("killed", 0), ("killed", 1), ("failed", 2), ("stopped", 0), ("stopped", 1), ("stuck", 1)]
)
def test_ranks_name_the_one_that_does_not_come_and_end(kind, victim):
    """Their main threads wait for ever: the watch ends them."""
    command = [sys.executable, "-c", RANKS, kind, str(victim)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    assert done.stdout == "[1, 1]\n", done.stderr
    pattern = rf"error: rank {victim} \(process \d+ on \S+\) {WORDS[kind]}\. Go on from the last checkpoint"
    lines = done.stderr.splitlines()  # two where the first rank of the host, which speaks for the others, is lost
    assert len(lines) == (2 if victim == 0 else 1) and all(re.match(pattern, line) for line in lines), done.stderr


def _lose_the_first(dist) -> None:
    with dist.watched():
        dist.barrier()
        time.sleep(1.5)  # a beat
        if dist.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.sum([1.0])


def test_a_rank_that_can_raises_what_the_watch_has_found_out():
    processes, results = start_ranks(2, _lose_the_first, timeout_minutes=5)
    try:
        rank, _, error = pickle.loads(results.get(timeout=300))
        assert rank == 1 and re.search(r"LostRank: rank 0 \(process \d+ on \S+\) is gone", error), error
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(dist, seconds: float) -> int:
    os.environ["DS_TOKIMG_TIMEOUT"], watch.IDLE_FACTOR = "10", 0.1
    with dist.watched():
        if dist.rank == 0:  # tokenises, say: open-ended, so that one second without progress does not end it
            time.sleep(seconds)
        dist.barrier()
    return dist.rank


def test_a_long_start_is_waited_for_and_the_end_is_quiet(capfd):
    assert run_ranks(2, _work, 5.0) == [0, 1]
    assert capfd.readouterr().err == ""


def test_a_peer_is_given_ten_times_its_longest_silence():
    peer = Peer({"rank": 1, "pid": 2, "host": "h", "step": 3, "doing": "saving"}, silent=30.0)
    peer.heard(peer.state)
    peer.silent = 299.0
    assert peer.problem(60.0) is None
    peer.silent = 301.0
    assert "rank 1 (process 2 on h) has been silent for 301 s, at step 3, saving" in (peer.problem(60.0) or "")


def test_progress_counts_collectives_and_the_longest_time_between_two():
    progress = Progress(open_ended=False)
    time.sleep(0.05)
    progress.enter()
    assert progress.entered == 1 and progress.waiting and progress.longest >= 0.05
    progress.leave()
    with progress.while_doing("saving"):
        assert progress.doing == "saving" and not progress.waiting
    assert progress.doing == "starting"


CHILD = """
import os, sys, time
from ds_tokimg.engine.launchers import Launchers
launchers = Launchers()
print(len(launchers), flush=True)
sys.stdin.readline()
time.sleep(0.3)
print(launchers.gone(), flush=True)
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.parametrize(
    "name, variables, links",
    [("torchrun", {"LOCAL_RANK": "0"}, 1), ("start.py", {"LOCAL_RANK": "0"}, 0), ("torchrun", {}, 0)],
)
def test_only_a_launcher_is_watched(name, variables, links, tmp_path):
    """A process that a launcher started notices its end; one of a shell or a script of the user's does not care."""
    (tmp_path / name).write_text(PARENT)
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", SCRIPT)} | variables
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / name), CHILD],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert int(parent.stdout.readline()) == links
        parent.kill()
        parent.stdin.write("go on\n")
        parent.stdin.flush()
        assert parent.stdout.readline().strip() == str(links > 0)
