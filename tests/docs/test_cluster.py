"""What docs/cluster.md gives to schedulers: the script is run with stand-ins for Slurm, the manifest is read. What all
its commands train is trained by two ranks, from a stand-in for the Hub."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from test_docs import ROOT, Block, blocks_of

from pocketlm.cli.train import _parser
from stand_in import standing_in

SRUN = '#!/bin/sh\nshift 2\necho "$@"\nexit $CODE\n'
SCONTROL = '#!/bin/sh\ncase "$1" in show) echo node7; echo node8 ;; *) echo "scontrol $*" ;; esac\n'
# What a test cannot wait for, and where the text lies; none of it is of several ranks.
SMALL = {
    "data.source": "hf:someone/texts",
    "data.tokenizer": "byte",
    "data.context": 32,
    "model.vocab-size": 257,
    "model.hidden-size": 36,
    "model.intermediate-size": 64,
    "model.num-hidden-layers": 1,
    "model.head-dim": 4,
    "train.tokens-per-step": 256,
    "train.eval-tokens": 256,
    "train.threads": 1,
    "schedule.warmup-steps": 1,
    "sample.max-new-tokens": 1,
}


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


def test_what_the_commands_train_is_trained_by_several_ranks(tmp_path: Path) -> None:
    """Also where that is text which streams, as it does in every preset of the seeds."""
    text = "".join(each.text for each in blocks_of(ROOT / "docs" / "cluster.md"))
    presets = set(re.findall(r"pocketlm,? train,? ([\w.-]+)", text))
    fields = re.findall(r"--(?:engine|[a-z]+\.[\w.-]+)", text)
    assert (presets, fields) == ({"smollm2-135m"}, []), "what is tried here"
    texts = "".join(json.dumps({"text": f"{number}: apples and pears. " * 40}) + "\n" for number in range(400))
    words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "pocketlm", "train", "smollm2-135m", "--out", "run", "--total-steps", "3"]
    with standing_in() as hub:
        hub.add("someone/texts", {"texts.jsonl": texts.encode()})
        done = subprocess.run(
            [*command, *words, "--device", "cpu", "--devices", "2"],
            cwd=tmp_path,
            env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert "ranks: 2 processes" in done.stderr
    assert "training waited" in done.stderr, "nothing has streamed"


def codes(rule: dict[str, dict[str, list[int]]]) -> list[int]:
    return rule.get("onExitCodes", {}).get("values", [])
