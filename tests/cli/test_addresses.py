"""Where the hosts of a run meet: who opens that place, and what is said where they do not.

Two real hosts are in tests/resume/test_hosts.py.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from launched import Launched

from pocketlm.cli import addresses
from pocketlm.cli.addresses import Place
from pocketlm.cli.main import main
from pocketlm.errors import RankLost, UsageError


def test_hosts_that_do_not_come_are_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = f"127.0.0.1:{free.getsockname()[1]}"
    it = Launched.program(tmp_path / "run", "done", devices=1, nodes=2, rendezvous=place, meet_s=1)
    code, _, said = it.end()
    assert code == 1
    assert f"pocketlm: the other hosts did not come to {place} within 15 minutes; the same command" in said


def test_a_second_launcher_of_a_host_joins_the_first_and_another_server_is_no_place_to_meet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UsageError, match=r"port \d+ cannot be opened on this host \(Address already in use\)"):
            addresses.meeting(place, 0).__enter__()
    with addresses.meeting(place, 0) as first, addresses.meeting(place, 0) as second:
        assert (first, second) == (Place("127.0.0.1", True), Place("127.0.0.1", sys.platform != "linux"))
    with addresses.meeting(place, 0) as alone:
        assert alone.is_host


def test_a_host_that_nobody_knows_is_asked_for_until_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(addresses, "TRY_EVERY_S", 0)
    with pytest.raises(RankLost, match=r"--rendezvous: nohost was not found within 0 minutes \(Name or service"):
        addresses.meeting("nohost:1", 0.001).__enter__()
    assert capsys.readouterr().err == "nohost is not found yet (Name or service not known); it is tried again\n"


@pytest.mark.parametrize(
    ("world", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is in the environment, and RANK, MASTER_ADDR, MASTER_PORT not: torchrun"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: given abc in the environment, allowed is a whole number >= 1"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK: given 2, allowed with WORLD_SIZE=2 is 0 to 1",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "http"},
            "MASTER_PORT: given http in the environment, allowed is a whole number >= 1",
        ),
    ],
)
def test_an_environment_that_tells_half_of_a_world_is_refused(
    world: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in world.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "debug"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pocketlm: {message}")
    assert said.count("\n") == 1
