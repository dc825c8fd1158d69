"""What docs/cluster.md gives to schedulers: the script is run with stand-ins for Slurm, the manifest is read."""

from __future__ import annotations

import os
import shlex
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from test_docs import ROOT, Block, blocks_of

from pocketlm.cli.train import _parser

SRUN = '#!/bin/sh\nshift 2\necho "$@"\nexit $CODE\n'
SCONTROL = '#!/bin/sh\ncase "$1" in show) echo node7; echo node8 ;; *) echo "scontrol $*" ;; esac\n'


def block(language: str) -> Block:
    return next(block for block in blocks_of(ROOT / "docs" / "cluster.md") if block.language == language)


def parsed(words: list[str]) -> Namespace:
    """As `pocketlm train` takes it."""
    assert words[:2] == ["pocketlm", "train"]
    arguments, fields = _parser().parse_with_fields(words[2:])
    assert fields == []
    return arguments


@pytest.mark.parametrize("code", [0, 1, 3, 143])
def test_only_a_preempted_job_is_put_back_into_the_queue(code: int, tmp_path: Path) -> None:
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    world = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "64"}
    world |= {"SLURM_JOB_ID": "5", "CODE": str(code), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-uc", block("bash").text], env=world, capture_output=True, text=True)
    assert done.stderr == ""
    command, *rest = done.stdout.splitlines()
    arguments = parsed(shlex.split(command))
    assert (arguments.nodes, arguments.rendezvous, arguments.devices) == (2, "node7:29500", "8")
    assert (done.returncode, rest) == (code, ["scontrol requeue 5"] if code == 143 else [])


def test_the_pods_of_the_manifest_meet() -> None:
    service, job = yaml.safe_load_all(block("yaml").text)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    arguments = parsed(container["command"] + container["args"])
    assert arguments.nodes == spec["completions"] == spec["parallelism"]
    assert int(arguments.devices) == container["resources"]["limits"]["nvidia.com/gpu"]
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert arguments.rendezvous.partition(":")[0] == first
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    actions = {code: rule["action"] for rule in spec["podFailurePolicy"]["rules"] for code in codes(rule)}
    assert actions == {2: "FailJob", 3: "FailJob", 4: "FailJob", 143: "Ignore"}


def codes(rule: dict[str, dict[str, list[int]]]) -> list[int]:
    return rule.get("onExitCodes", {}).get("values", [])
