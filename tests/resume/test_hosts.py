"""Two hosts that reach one another by a network alone: how they meet, and what becomes of a run when one is killed.

A host is a network namespace of its own with its own launcher, torchrun and ranks. Where one of them is killed, the
store over which they meet runs in a third one, which never is. To make them takes root on Linux.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import psutil
import pytest
from rig import flags
from world import trained

STORE = "10.77.0.1"
HOSTS = {"a": "10.77.0.2", "b": "10.77.0.3"}
SERVE = """
import sys, torch.distributed as dist
store = dist.TCPStore(sys.argv[1], 29400, is_master=True, wait_for_workers=False)
print("up", flush=True)
sys.stdin.read()
"""
AS_HOST = """
mount --bind "$1" /etc/hosts
echo "$2" > /proc/sys/kernel/hostname
shift 2
exec "$@"
"""
RANKS = Path(__file__).parents[1] / "cli" / "rank_program.py"
STEPS, EVERY = 400, 10
FIELDS = {"train.total_steps": STEPS, "train.checkpoint_every": EVERY, "train.eval_every": 0, "train.threads": 1}
LIMIT_S = 180.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Network:
    """Three namespaces on one switch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.prefix = folder, f"plt{os.getpid()}"
        self.launchers: dict[str, subprocess.Popen[bytes]] = {}
        self.store: subprocess.Popen[bytes] | None = None
        for host in ("s", *HOSTS):
            ip("netns", "add", self.space(host))
            ip("-n", self.space(host), "link", "set", "lo", "up")
        ip("-n", self.space("s"), "link", "add", "name", "hub", "type", "bridge")
        ip("-n", self.space("s"), "addr", "add", f"{STORE}/24", "dev", "hub")
        ip("-n", self.space("s"), "link", "set", "hub", "up")
        for host, address in HOSTS.items():
            ip(*f"-n {self.space('s')} link add port-{host} type veth peer name eth netns {self.space(host)}".split())
            ip("-n", self.space("s"), "link", "set", f"port-{host}", "master", "hub", "up")
            ip("-n", self.space(host), "addr", "add", f"{address}/24", "dev", "eth")
            ip("-n", self.space(host), "link", "set", "eth", "up")

    def open_store(self) -> None:
        self.store = subprocess.Popen(
            self.inside("s", sys.executable, "-c", SERVE, STORE),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self.store.stdout
        assert self.store.stdout.readline() == b"up\n"

    def space(self, host: str) -> str:
        return f"{self.prefix}-{host}"

    def inside(self, host: str, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.space(host), *words]

    def start(self, host: str, out: str) -> None:
        """What a person types on each host."""
        words = ["train", "debug", "--out", out, "--name", out, *flags(FIELDS), "--train.strategy", "fsdp"]
        words += ["--devices", "1", "--nodes", "2", "--rendezvous", f"{STORE}:29400", "--max-restarts", "99"]
        self._start(host, self.inside(host, sys.executable, "-m", "pocketlm", *words))

    def start_ranks(self, host: str, rendezvous: str, attempt: str) -> None:
        """Ranks that train nothing, under a launcher that takes its own name for 127.0.1.1, as Debian writes it."""
        self.names(host).write_text(f"127.0.0.1 localhost\n127.0.1.1 {host}\n")
        plan = json.dumps({"devices": 1, "nodes": 2, "rendezvous": rendezvous})
        words = [sys.executable, str(RANKS), "launch", plan, str(self.folder / "run"), attempt]
        self._start(
            host, self.inside(host, "unshare", "--uts", "sh", "-ec", AS_HOST, "-", str(self.names(host)), host, *words)
        )

    def names(self, host: str) -> Path:
        """Its /etc/hosts."""
        return self.folder / f"{host}.hosts"

    def _start(self, host: str, command: list[str]) -> None:
        with (self.folder / f"{host}.txt").open("ab") as output:
            self.launchers[host] = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )

    def processes(self, host: str) -> list[psutil.Process]:
        pids = subprocess.run(["ip", "netns", "pids", self.space(host)], check=True, capture_output=True).stdout
        return [psutil.Process(int(pid)) for pid in pids.split() if psutil.pid_exists(int(pid))]

    def kill(self, host: str) -> None:
        """As if its power went: all of its processes at once, as far as that can be."""
        for process in self.processes(host):
            try:
                process.send_signal(signal.SIGSTOP)
            except psutil.NoSuchProcess:
                continue
        while processes := self.processes(host):
            for process in processes:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(processes, timeout=10)
        if host in self.launchers:
            self.launchers.pop(host).wait()

    def wait(self) -> dict[str, int | None]:
        """The exit code of each launcher; None where one has not ended for so long that it never will."""
        codes = {}
        for host, launcher in self.launchers.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(LIMIT_S)
            codes[host] = launcher.poll()
        return codes

    def said(self) -> str:
        return "\n".join(f"{host}: {(self.folder / f'{host}.txt').read_text()[-4000:]}" for host in HOSTS)

    def close(self) -> None:
        for host in HOSTS:
            self.kill(host)
        if self.store:
            self.store.communicate()
        for host in ("s", *HOSTS):
            ip("netns", "del", self.space(host))


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    if not sys.platform.startswith("linux") or os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces take root and iproute2 on Linux")
    trial = f"plt{os.getpid()}-try"
    try:
        ip("netns", "add", trial)
        ip(*f"netns exec {trial} unshare --uts mount --bind /etc/hosts /etc/hosts".split())
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    finally:
        subprocess.run(["ip", "netns", "del", trial], capture_output=True)
    network = Network(tmp_path)
    yield network
    network.close()


def wait_until(network: Network, is_so: Callable[[], bool]) -> None:
    """For what files tell: they have no end that one could wait at."""
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline, network.said()
        time.sleep(0.01)


def test_the_host_that_is_the_place_to_meet_knows_it(network: Network, tmp_path: Path) -> None:
    """By its address, or by a name that the name server knows only after it has begun; torchrun would know neither."""

    def said(host: str) -> str:
        return (tmp_path / f"{host}.txt").read_text()

    for host in HOSTS:
        network.start_ranks(host, f"{HOSTS['b']}:29400", "refuse,done")
    assert network.wait() == {"a": 3, "b": 3}, network.said()
    assert [said(host).count("rank 0 is refused") for host in HOSTS] == [1, 1], "each has a person who reads it"

    for host in HOSTS:
        network.start_ranks(host, "place:29400", "done,done")
    wait_until(network, lambda: all("place is not found yet" in said(host) for host in HOSTS))
    for host in HOSTS:
        with network.names(host).open("a") as names:
            names.write(f"{HOSTS['b']} place\n")
    assert network.wait() == {"a": 0, "b": 0}, network.said()


@pytest.mark.goal("R20")
def test_a_host_that_is_killed_comes_back_and_the_run_ends_as_if_it_had_not(
    proof: Any, network: Network, tmp_path: Path
) -> None:
    network.open_store()
    for host in HOSTS:
        network.start(host, "whole")
    assert network.wait() == {"a": 0, "b": 0}, network.said()

    for host in HOSTS:
        network.start(host, "run")
    for case in proof.cases(1, 10):
        luck = proof.random(case)
        target = round(STEPS * (case + luck.random()) / proof.size(1, 10) * 0.9)
        wait_until(network, lambda target=target: trained(tmp_path / "run") >= target)
        victim = luck.choice(list(HOSTS))
        network.kill(victim)
        network.start(victim, "run")
    assert network.wait() == {"a": 0, "b": 0}, network.said()
    assert trained(tmp_path / "run") == STEPS
    oracle.assert_equal(tmp_path / "run", tmp_path / "whole")
