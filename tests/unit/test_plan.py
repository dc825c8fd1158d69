"""What a plan counts, against hand-computed numbers, real runs and real files; what it makes of measured seconds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketlm import checkpoint
from pocketlm.config import Config
from pocketlm.data.shards import open_dataset
from pocketlm.errors import ConfigError, UsageError
from pocketlm.journal import Journal
from pocketlm.training import gpus, plan, resolve
from pocketlm.training.gpus import ASSUMED_MFU, find_gpu, gpu_by_name
from pocketlm.training.log import Silent
from pocketlm.training.loop import train
from pocketlm.training.meter import Meter
from pocketlm.training.micro_batch import evenly
from pocketlm.training.plan import plan_for, plan_here
from pocketlm.training.probe import Probed, RandomRows
from pocketlm.training.state import read_state
from pocketlm.training.work import checkpoint_bytes, work_of


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve, "matmul_rate", lambda config, device, dtype: 1e9)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


class Saved(Silent):
    """Counts the checkpoints of a run."""

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def saved(self, folder: Path) -> None:
        self.folders.append(folder)


# --- counted


def test_the_work_of_smallm_by_hand() -> None:
    work = work_of(Config.preset("smallm", {"train.eval_tokens": 10_000}), None)
    assert work.tokens == 158_000 * 63_488 == 10_031_104_000
    # 6 x (8 x 950,016 in the blocks' matrices + 50,257 x 256) + 6 x 8 layers x 256 tokens x 4 heads x 64
    assert work.flops == work.tokens * (6 * (8 * 950_272 + 12_865_792) + 6 * 8 * 256 * 4 * 64)
    assert (work.steps, work.evaluations, work.evaluated_tokens) == (158_000, 158, 10_000)
    assert (work.checkpoints, work.kept) == (159, 3)


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"train.total_steps": 12},
            {"train.total_steps": 10},
            {"train.eval_every": 0},
            {"train.checkpoint_every": 99},
        ),
        *({"schedule.kind": "wsd"}, {"schedule.continued_at": [7], "schedule.continued_to": [0.1]}),
    ],
    ids=str,
)
def test_a_run_does_the_work_that_was_counted(fields: dict[str, Any]) -> None:
    config = Config.preset("debug", {"train.total_steps": 11, "sample.prompts": []} | fields)
    heard = Saved()
    run = train(config, out=Path("run"), listener=heard)
    planned = plan_here(config, lambda text: None)
    evaluations = [record for record in Journal.read(run / "metrics.jsonl") if record["kind"] == "eval"]
    assert planned.work.evaluations == len(evaluations)
    assert planned.work.evaluated_tokens == evaluations[-1]["tokens"]
    assert planned.work.checkpoints == len(heard.folders)
    assert planned.work.kept >= len(checkpoint.list_checkpoints(run))
    data = [path for path in Path("data").rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert planned.data_bytes == sum(path.stat().st_size for path in data)


@pytest.mark.parametrize("fields", [{}, {"optim.kind": "muon"}, {"model.tie_word_embeddings": False}], ids=str)
def test_the_bytes_of_a_checkpoint_are_those_of_a_real_one(fields: dict[str, object]) -> None:
    config = Config.preset("debug", {"train.total_steps": 6, "sample.prompts": []} | fields)
    run = train(config, out=Path("run"))
    newest = checkpoint.list_checkpoints(run)[-1]
    block = checkpoint.BLOCK_BYTES
    files = [path for path in newest.rglob("*") if path.is_file()]
    real = sum(math.ceil(path.stat().st_size / block) * block for path in files) + 2 * block  # and two folders
    tokenizer = open_dataset(next(Path("data").iterdir())).tokenizer
    planned = checkpoint_bytes(config, tokenizer, read_state(newest).resolved)
    assert abs(planned - real) <= block


def test_nothing_of_a_large_models_checkpoint_is_allocated() -> None:
    config = Config.preset("smollm2-1.7b")
    here = plan_for(config, find_gpu("H200"))
    assert here.checkpoint_bytes == pytest.approx(12 * 1_711_376_384, rel=1e-3)


# --- another device


def test_a_plan_for_a_gpu_that_is_not_here_by_hand() -> None:
    config = Config.preset("smollm2-135m-official", {"train.eval_every": 0, "train.eval_tokens": 2048})
    planned = plan_for(config, find_gpu("h100"))
    per_token = 1_019_215_872
    step_s = 1_048_576 * per_token / (0.35 * 989e12) + 30 * 134_515_008 / 3350e9
    assert ASSUMED_MFU == 0.35
    assert planned.step_s == pytest.approx(step_s)
    assert planned.seconds.steps == pytest.approx(2_000_000 * step_s)
    assert planned.seconds.evaluations == pytest.approx(2048 * per_token / 3 / (0.35 * 989e12))
    assert planned.mfu == pytest.approx(0.35, rel=0.01)
    assert planned.memory.peak_bytes <= 80e9
    assert planned.micro_batch == evenly(512, planned.micro_batch)
    assert planned.tree()["assumed_mfu"] == 0.35


def test_several_gpus_that_are_not_here_by_hand() -> None:
    """Three of them: 171 of 512 rows on the first; of the state all, which a 24 GB GPU has room for, or a third."""
    for strategy, held in (("auto", 1), ("fsdp", 3)):
        fields = {"train.eval_every": 0, "train.eval_tokens": 2048, "train.strategy": strategy}
        planned = plan_for(Config.preset("smollm2-135m-official", fields), find_gpu("L4"), 3)
        per_token, rate = 1_019_215_872, 0.35 * 121e12
        assert planned.step_s == pytest.approx(171 * 2048 * per_token / rate + 30 * 134_515_008 / held / 300e9)
        assert planned.seconds.evaluations == pytest.approx(2048 * per_token / 3 / rate / 3)
        assert planned.mfu == pytest.approx(0.35, rel=0.01)
        tree = planned.tree()
        assert (tree["devices"], tree["strategy"]) == (3, "ddp" if held == 1 else "fsdp")
        assert tree["memory_bytes"]["by_part"]["weights"] == 4 * 134_515_008 // held
        assert max(row["micro_batch"] for row in tree["memory_bytes"]["by_micro_batch"]) == 171
        assert "what the devices say to one another" in tree["left_out"]


def test_fp32_on_a_gpu_is_real_fp32_by_hand() -> None:
    """pocketlm multiplies in fp32, not in TF32: 67 TFLOP/s of an H100."""
    fields = {"data.context": 512, "train.tokens_per_step": 8 * 512, "train.dtype": "fp32"}
    planned = plan_for(Config.preset("smollm2-135m", fields), find_gpu("H100"))
    per_token = 6 * 134_479_872 + 6 * 30 * 512 * 576
    assert planned.step_s == pytest.approx(4096 * per_token / (0.35 * 67e12) + 30 * 134_515_008 / 3350e9)


def test_bf16_on_a_gpu_without_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"T4 has no bf16; type: --train.dtype fp16"):
        plan_for(Config.preset("tiny", {"train.dtype": "bf16"}), find_gpu("T4"))
    assert plan_for(Config.preset("tiny", {"train.dtype": "auto"}), find_gpu("T4")).dtype == "fp16"


def test_what_does_not_fit_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"smollm2-1.7b needs about .* GB"):
        plan_for(Config.preset("smollm2-1.7b"), find_gpu("T4"))


@pytest.mark.parametrize(
    ("typed", "name"), [("H100", "H100"), ("rtx 4090", "RTX-4090"), ("A100", "A100-40GB"), ("a100-80gb", "A100-80GB")]
)
def test_gpus_are_found_by_name(typed: str, name: str) -> None:
    assert find_gpu(typed).name == name


def test_an_unknown_gpu_is_refused_with_the_nearest_and_all() -> None:
    with pytest.raises(UsageError, match=r"no device 'H10O' in the table; did you mean H100\?; devices: H200, "):
        find_gpu("H10O")


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", 65e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        *(
            (name, None)
            for name in ("Quadro P400", "NVIDIA L40", "NVIDIA T400", "GeForce GT 430", "NVIDIA GH200 480GB")
        ),
        *((name, None) for name in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU")),
        *((name, None) for name in ("NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce 4090")),
    ],
)
def test_the_rate_of_a_gpu_by_the_name_that_it_gives_itself(name: str, rate: float | None) -> None:
    gpu = gpu_by_name(name)
    assert (gpu and gpu.flops) == rate


def test_a_gpu_has_a_rate_of_each_precision() -> None:
    gpu = find_gpu("H100")
    assert (gpu.rate("bf16"), gpu.rate("fp32")) == (989e12, 67e12)


def test_the_help_names_every_gpu() -> None:
    from pocketlm.cli.plan import DEVICES

    assert ", ".join(gpu.name for gpu in gpus.GPUS) == DEVICES


# --- measured


def probed(**fields: object) -> Probed:
    made = Probed(micro_batch=4, num_micro_batches=10, step_tokens=10_000)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_a_long_step_is_made_up_of_short_ones() -> None:
    # one micro-batch takes 1 s, four take 2.5: half a second each, and half a second for the update
    made = probed(first_s=3.0, short_s=[1.0, 0.9, 1.1], long=4, long_s=[2.5, 2.6, 2.4])
    assert made.update_s == pytest.approx(0.5)
    assert made.step_s == pytest.approx(0.5 + 10 * 0.5)
    assert made.rates == pytest.approx([10_000 / 5.5 * 2.5 / tried for tried in (2.5, 2.6, 2.4)])
    assert made.extra_first_s == pytest.approx(2.0)


def test_a_step_that_was_tried_whole_is_what_it_is() -> None:
    made = probed(short_s=[1.0], long=10, long_s=[5.0, 7.0, 6.0])
    assert made.step_s == 6.0
    assert sorted(made.rates) == pytest.approx([10_000 / 7, 10_000 / 6, 2000])


def test_where_only_single_micro_batches_could_be_tried() -> None:
    made = probed(short_s=[2.0, 4.0, 3.0])
    assert made.step_s == 30.0
    assert made.rates == pytest.approx([500, 250, 1000 / 3])
    assert made.update_s == 0.0


def test_random_rows_are_a_function_of_the_position() -> None:
    rows = RandomRows(Config.preset("debug"))
    assert rows.read(3, 8).shape == (8, 33)
    assert torch.equal(rows.read(3, 8), rows.read(3, 8))
    assert not torch.equal(rows.read(3, 8), rows.read(4, 8))
    assert 0 <= int(rows.read(0, 99).min()) < int(rows.read(0, 99).max()) < 257


def test_the_parts_of_a_plan_add_up() -> None:
    config = Config.preset("debug", {"data.tokenizer": "byte"})
    planned = plan_here(config, lambda text: None)
    tree = planned.tree()
    times = tree["time_s"]
    assert times["total"] == sum(seconds for part, seconds in times.items() if part != "total")
    assert times["steps"] == 60 * planned.step_s > 0
    assert tree["tokens_per_s"] * tree["step_s"] == pytest.approx(256)
    assert tree["mfu"] == pytest.approx(tree["tokens_per_s"] * tree["flops_per_token"] / 1e9)
    assert tree["disk_bytes"]["peak"] == 4 * tree["disk_bytes"]["checkpoint"], "a new one before an old one goes"
    assert tree["disk_bytes"]["checkpoints"] == 3 * tree["disk_bytes"]["checkpoint"]
    sizes = [row["bytes"] for row in tree["memory_bytes"]["by_micro_batch"]]
    assert sizes == sorted(sizes)
    assert tree["memory_bytes"]["peak"] < tree["memory_bytes"]["available"]
    assert any("not prepared" in line for line in tree["left_out"])


def test_the_seconds_of_saves_are_a_hash_and_a_comparison_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_hash_s_per_byte", lambda: 1e-3)
    planned = plan_here(Config.preset("debug", {"data.tokenizer": "byte"}), lambda text: None)
    assert planned.seconds.checkpoints == pytest.approx(
        1.25 * planned.work.checkpoints * planned.checkpoint_bytes / 1e3
    )


def test_what_the_process_has_is_not_counted_twice() -> None:
    memory = plan.Memory(None, 100, 1000, 0, [])  # type: ignore[arg-type]
    assert (memory.fits(1100), memory.fits(1101)) == (True, False)


@pytest.mark.parametrize(
    ("rate", "tried"),
    [
        # a row of 1,024 tokens has 9.4e11 FLOPs, at 35 % of the rate:
        (1e12, (1024, 1)),  # 2.7 s
        (3e12, (1024, 4)),  # 0.9 s: four of them are below 4 s
        (3e13, (1024, 5)),  # all of a micro-batch
        (4e11, (512, 1)),  # 6.7 s, half a row 3.1 s
        (1e9, (64, 1)),  # hours: the shortest
    ],
)
def test_what_takes_too_long_is_tried_with_less_at_once(
    rate: float, tried: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[int, int, int]]()

    def tries(config: Config, resolved: resolve.Resolved, *rest: object, **options: object) -> Probed:
        asked.append((config.data.context, resolved.micro_batch, config.rows_per_step))
        return probed(short_s=[1.0], micro_batch=resolved.micro_batch)

    monkeypatch.setattr(plan, "probe", tries)
    config = Config.preset("smollm2-135m", {"data.context": 1024, "train.tokens_per_step": 20 * 1024})
    slow = resolve.Resolved(
        dtype="fp32",
        attention="sdpa",
        fp32_matmul="highest",
        compile=False,
        micro_batch=5,
        threads=1,
        device="cpu",
        determinism="bitwise",
        peak_flops=rate,
        reasons={},
    )
    trial = plan._try(config, slow, None, lambda text: None)  # type: ignore[arg-type]
    assert asked == [(*tried, 20)]
    per_token = [6 * 134_479_872 + 6 * 30 * context * 576 for context in (1024, tried[0])]
    assert trial.factor == pytest.approx(per_token[0] / per_token[1])
    assert trial.is_whole == (tried == (1024, 5))
    assert trial.micro_batch == 5


# --- energy


def package(root: Path, number: int, microjoules: str) -> Path:
    folder = root / f"sys/class/powercap/intel-rapl:{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(microjoules)
    (folder / "max_energy_range_uj").write_text("1000000\n")
    return folder


def test_energy_is_the_sum_of_the_packages(tmp_path: Path) -> None:
    package(tmp_path, 0, "100\n")
    package(tmp_path, 1, "900000\n")
    package(tmp_path, 0, "100\n").with_name("intel-rapl:0:0").mkdir()  # a part of a package: not counted twice
    meter = Meter(tmp_path)
    package(tmp_path, 0, "2000100\n")
    package(tmp_path, 1, "100000\n")  # it has begun again at zero
    assert meter.joules() == pytest.approx(2.0 + 0.2)


def test_without_a_meter_nothing_is_guessed(tmp_path: Path) -> None:
    assert Meter(tmp_path).joules() is None
    package(tmp_path, 0, "not a number\n")
    assert Meter(tmp_path).joules() is None
