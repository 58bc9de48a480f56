"""Signals before there is anything to save, and to a rank that is held up. Processes without torch."""

import signal
import subprocess
import sys
import time
import types

import pytest

from ds_tokimg.training import signals

STUCK = """
import ctypes, types
from ds_tokimg.training.signals import StopSignals

dist = types.SimpleNamespace(rank=0, watch=types.SimpleNamespace())
with StopSignals(types.SimpleNamespace(stop_requested=False, dist=dist)):
    mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    library.pthread_mutex_init(mutex, None)
    library.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    library.pthread_mutex_lock(mutex)  # for ever, as in a collective
"""
EARLY = """
import time
from ds_tokimg.training.signals import before_training
with before_training():
    print("ready", flush=True)
    time.sleep(60)
"""
POOL = """
import multiprocessing
from ds_tokimg.training.signals import before_training
with before_training():
    print("ready", flush=True)
    with multiprocessing.get_context("fork").Pool(2) as pool:  # its workers end by SIGTERM
        print(pool.map(abs, [-1, 2]), flush=True)
    print("goes on", flush=True)
"""


def started(script: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_ctrl_c_ends_a_rank_that_waits_for_another():
    with started(STUCK) as process:
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert "SIGINT: the run saves and ends once its ranks have come together" in process.stdout.readline()
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        assert "SIGINT again: ended at once" in process.stdout.readline()
        assert process.wait(timeout=90) == 128 + signal.SIGINT


def test_a_run_that_has_been_asked_to_stop_begins_nothing_more():
    """The samples at its end, say: that they are left out is then said."""
    asked = signals.StopSignals(types.SimpleNamespace(stop_requested=True))
    with pytest.raises(signals.Interrupted), asked.interrupting():
        pytest.fail("it has begun")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_before_the_first_step_a_signal_is_a_clean_end(number):
    with started(EARLY) as process:
        process.send_signal(number)
        assert "ended. The run had not begun its first step" in process.stdout.readline()
        assert process.wait(timeout=90) == 0


def test_signals_of_the_workers_of_a_pool_are_their_own():
    with started(POOL) as process:
        assert process.communicate(timeout=90)[0] == "[1, 2]\ngoes on\n"
        assert process.returncode == 0
