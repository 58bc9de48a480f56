"""Two hosts on one machine for tests: network namespaces joined by a cable, each with its own name, processes and sshd.

All sockets stay inside the namespaces. What is made here has this process's number in its name, and the processes that
are started are taken down by theirs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ADDRESSES = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
CONFIG = Path("/etc/netns")  # `ip netns exec NAME` shows CONFIG/NAME/* in place of /etc/*
SSHD = "/usr/sbin/sshd"
SSH_CONFIG = """Host *
    IdentityFile /etc/ssh/identity
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""
SSHD_CONFIG = """HostKey /etc/ssh/identity
AuthorizedKeysFile /etc/ssh/identity.pub
StrictModes no
PermitRootLogin yes
UsePAM no
PidFile none
"""
# A host is one tree of processes that ends with its first one.
HOST = "hostname {name} && mount -t tmpfs none /run && mkdir /run/sshd && exec {sshd} -D -e"


def skip_without_hosts() -> None:
    """Skips a test where hosts cannot be made, with the reason."""
    if os.geteuid() != 0:
        pytest.skip("two hosts need root")
    missing = [tool for tool in ("ip", "ssh", "ssh-keygen", "unshare", "hostname") if shutil.which(tool) is None]
    missing += [] if Path(SSHD).is_file() else ["sshd"]
    if missing:
        pytest.skip(f"two hosts need {', '.join(missing)} (packages iproute2, openssh-server, util-linux, hostname)")
    probe = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    subprocess.run(["ip", "netns", "del", probe], check=True)


class Hosts:
    """`node1` and `node2`, reachable from each other over ssh. To be used in a `with` statement."""

    def __init__(self) -> None:
        self.spaces = {name: f"tokimg{os.getpid()}{name}" for name in ADDRESSES}
        self.processes: dict[str, subprocess.Popen] = {}
        self.calls: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        self.made_config = not CONFIG.exists()
        try:
            self._make_network()
            self._make_keys()
            for name in ADDRESSES:
                self._start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        for name in list(self.processes):
            self.kill(name)
        for call in self.calls:
            call.kill()
            call.wait()
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            shutil.rmtree(CONFIG / space, ignore_errors=True)
        if self.made_config:
            CONFIG.rmdir()

    def start(self, host: str, command: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen:
        """A shell command on a host, with its output in pipes."""
        exports = " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())
        line = f"cd {shlex.quote(str(folder))} && export {exports} && {command}"
        ssh = ["ip", "netns", "exec", self.spaces[host], "ssh", host, line]
        call = subprocess.Popen(ssh, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.calls.append(call)
        return call

    def run(self, host: str, command: str, timeout: float = 120.0) -> str:
        """The output of a short shell command on a host, however it ends."""
        call = self.start(host, command, Path("/"), {"LC_ALL": "C"})
        return call.communicate(timeout=timeout)[0]

    def kill(self, host: str) -> None:
        """All processes of a host at once, as if somebody pulled its plug."""
        process = self.processes.pop(host)
        process.kill()
        process.wait()

    def restart(self) -> None:
        """Starts hosts that were killed."""
        for name in ADDRESSES.keys() - self.processes.keys():
            self._start(name)

    def _make_network(self) -> None:
        first, second = self.spaces.values()
        for space in (first, second):
            _run("ip", "netns", "add", space)
            _run("ip", "-n", space, "link", "set", "lo", "up")
        _run("ip", "-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
        for name, space in self.spaces.items():
            _run("ip", "-n", space, "addr", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "eth0", "up")

    def _make_keys(self) -> None:
        """One key is every host's and their user's."""
        folders = [CONFIG / space / "ssh" for space in self.spaces.values()]
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "ssh_config").write_text(SSH_CONFIG)
            (folder / "sshd_config").write_text(SSHD_CONFIG)
            lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in ADDRESSES.items())]
            (folder.parent / "hosts").write_text("\n".join(lines) + "\n")
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folders[0] / "identity"))
        for name in ("identity", "identity.pub"):
            shutil.copy(folders[0] / name, folders[1] / name)

    def _start(self, name: str) -> None:
        enter = ["ip", "netns", "exec", self.spaces[name]]
        isolate = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = HOST.format(name=name, sshd=SSHD)
        self.processes[name] = subprocess.Popen([*enter, *isolate, "sh", "-c", script], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while self.run(name, "hostname").strip() != name:
            assert time.monotonic() < deadline, f"{name} does not answer"
            time.sleep(0.1)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
