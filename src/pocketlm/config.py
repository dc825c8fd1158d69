"""What a run is: one frozen value, read from a preset or a TOML file, changed by flags, checked all at once.

    Config
      model     the architecture, in Hugging Face's words
      init      how its weights begin
      data      text source, tokenizer, context, split, order
      optim     AdamW, or Muon for the matrices and AdamW for the rest
      schedule  the learning rate's factor as a function of the step
      guard     when a step is skipped, and when the run goes back
      train     steps, tokens per step, precision, evaluation, checkpoints
      sample    how the finished model speaks, and what it is asked while it trains

A preset is a TOML file in `presets/`; a user's TOML file may begin with `preset = "NAME"` and change some of it.
Every field is a flag: `--optim.lr 3e-4`. All ways in meet in `Config.build`, which reports every problem at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from pocketlm.clashes import clashes, problems, unknown_field
from pocketlm.data_config import DataConfig as DataConfig
from pocketlm.data_config import SourceConfig as SourceConfig
from pocketlm.errors import ConfigError, FileError
from pocketlm.field_types import (
    MAX_SIZE,
    AttentionKernel,
    Count,
    Decay,
    Device,
    FP32Matmul,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Size,
    Strategy,
    Tracking,
)
from pocketlm.field_types import Section as Section
from pocketlm.toml_trees import Tree, flat, merged, nested, preset_names, preset_tree, read_toml


class ModelConfig(Section):
    """One decoder. With its defaults it is a Llama; `config.json` uses the same words."""

    vocab_size: Size = 50257
    """Rows of the embedding; at least the tokenizer's ids."""
    hidden_size: Size = 256
    """Width of the residual stream."""
    intermediate_size: Size = 1024
    """Inner width of the MLP."""
    num_hidden_layers: Size = 8
    """Blocks."""
    num_attention_heads: Size = 4
    """Query heads."""
    num_key_value_heads: Size = 4
    """Key and value heads; fewer than query heads is grouped-query attention, one is multi-query."""
    head_dim: Annotated[int, Field(ge=2, le=MAX_SIZE)] = 64
    """Width of a head; free, not hidden_size / heads."""
    max_position_embeddings: Size = 2048
    """Longest context that the model is made for."""
    block: Literal["sequential", "parallel"] = "sequential"
    """`parallel`: attention and MLP read one norm and are added together (PaLM)."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary angles, or a learned table."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies."""
    rope_llama3: tuple[Positive, Positive, Positive, Count] | None = None
    """Llama 3's scaling of the rotary frequencies: factor, low and high frequency factor, original context."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm with a bias."""
    norm_eps: Positive = 1e-5
    """Added to the mean square before the root."""
    mlp: Literal["swiglu", "gelu", "relu2"] = "swiglu"
    """SwiGLU has a gate; GELU (tanh form) and squared ReLU have none."""
    bias: bool = False
    """A bias on every projection."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation (Qwen3)."""
    tie_word_embeddings: bool = True
    """The output matrix is the embedding."""
    logit_softcap: Positive | None = None
    """Logits become cap * tanh(logits / cap)."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs, take an even one")
        if self.rope_llama3 and (self.position != "rope" or self.rope_llama3[1] >= self.rope_llama3[2]):
            raise ValueError(f"rope_llama3 {list(self.rope_llama3)}: allowed are rotary positions, and low below high")
        return self


class InitConfig(Section):
    """How weights begin; norms begin at one, biases at zero."""

    model: str | None = None
    """In place of all below: a model folder or Hub id whose weights it begins with, and whose shape [model] has."""
    std: Positive = 0.02
    """Standard deviation of embeddings, and of matrices unless fan_in_gain is given."""
    fan_in_gain: Positive | None = None
    """Matrices get gain / sqrt(inputs) instead of std."""
    output_projections: Literal["same", "depth-scaled", "zero"] = "same"
    """o_proj and down_proj: as the others, divided by sqrt(2 x layers) (GPT-2, Megatron), or zero (muP)."""
    previous_token_layers: Natural = 0
    """First layers whose first head begins by reading the token before (model/init.py says what it takes)."""


class OptimConfig(Section):
    """The optimizer."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`muon`: orthogonalised momentum for the blocks' matrices, AdamW for the rest."""
    lr: Positive = 3e-4
    """Peak rate of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay of the first and second moment."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.1
    """AdamW's decoupled weight decay."""
    decay: Literal["all", "matrices"] = "matrices"
    """What AdamW decays: every parameter, or only matrices and embeddings."""
    clip: Positive | None = None
    """Largest global gradient norm; none is no clipping."""
    muon_lr: Positive = 0.02
    """Peak rate of Muon."""
    muon_momentum: Decay = 0.95
    """Muon's momentum (Nesterov)."""
    muon_momentum_start: Decay = 0.85
    """Momentum at the first step, rising over the first tenth of the run."""
    muon_steps: Count = 5
    """Newton-Schulz steps."""
    muon_weight_decay: NonNegative = 0.0
    """Muon's decoupled weight decay."""


class ScheduleConfig(Section):
    """The learning rate's factor: up to 1, along, and down."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """`wsd`: warm-up, stable, linear decay over the last decay_fraction."""
    warmup_steps: Natural | None = None
    """Steps of linear warm-up; by default warmup_fraction of all."""
    warmup_fraction: Fraction = 0.02
    """Share of the steps that warm up, where warmup_steps is not given."""
    start_factor: Fraction = 0.0
    """Factor of the first step."""
    final_factor: Fraction = 0.0
    """Factor at the end."""
    decay_fraction: Fraction = 0.2
    """wsd: share of the steps that decay."""
    continue_lr: Positive | None = None
    """cosine, linear: AdamW's peak rate in additional steps, Muon's in proportion; by default 0.1 x optim.lr."""
    continued_at: tuple[Count, ...] = ()
    """Steps at which the run had ended before it got additional ones; it writes them down itself."""
    continued_to: tuple[Fraction, ...] = ()
    """The factor that it went on to, each time."""
    begun_with: Count | None = None
    """Total steps at the beginning, where they were changed since; warm-up and momentum stay as they were."""


class GuardConfig(Section):
    """When a step is skipped, and when the run goes back. A loss or gradient that is not finite is always skipped."""

    spike_sigma: NonNegative = 6.0
    """A loss so many deviations above the mean of the last ones is skipped; 0 for none."""
    window: Annotated[int, Field(ge=2, le=2**16)] = 128
    """Steps that mean and deviation are taken over, and that skips are counted in."""
    max_skips: Natural = 8
    """More skips than these in the window: back to the last checkpoint, and the data since then are left out."""
    max_rollbacks: Natural = 3
    """More times back than these: the run ends with exit code 4."""


class TrainConfig(Section):
    """The run."""

    total_steps: Count = 5000
    """Optimizer steps."""
    tokens_per_step: Count = 16384
    """Tokens of one optimizer step, whatever the micro-batch: a multiple of data.context."""
    micro_batch: Literal["auto"] | Count = "auto"
    """Rows that go through the model at once."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the computation; what is stored is fp32 always. fp16 is for GPUs without bf16. `auto` probes."""
    attention: Literal["auto"] | AttentionKernel = "auto"
    """PyTorch's kernel, or batched products folded by key-value head (model/attention.py). `auto` probes."""
    fp32_matmul: Literal["auto"] | FP32Matmul = "auto"
    """PyTorch's precision of fp32 products. `auto` takes medium on a CPU where it is faster and still real fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the blocks. `auto`: where a compiler is there and the run is long enough to pay for it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Weights, order and samples follow from it."""
    determinism: Literal["auto", "bitwise", "same-data", "off"] = "auto"
    """What is promised of a second run and of a resume; `auto` is bitwise on a CPU, same-data on a GPU."""
    device: Literal["auto"] | Device = "auto"
    """What computes: `auto` takes the first of these that is here. Until now only cpu was run (docs/train.md)."""
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    """CPU threads."""
    engine: Literal["torch", "lightning"] = "torch"
    """Who drives the steps: pocketlm's own loop, or lightning.Trainer (the extra [lightning]) around the same steps."""
    strategy: Literal["auto"] | Strategy = "auto"
    """With several devices: each holds the whole state, or a share of it (FSDP2). `auto`: whole where it fits."""
    rank_timeout_s: Positive = 600.0
    """With several devices: one that says nothing for so long is given up, and the run ends with an error."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more work."""
    loss_chunk: Literal["auto"] | Natural = "auto"
    """Rows of logits alive at once; 0 for all. `auto`: 1024, on a GPU with its own memory 1 GiB in fp32."""
    eval_every: Natural = 250
    """Steps between evaluations; 0 for only the last."""
    eval_tokens: Natural = 0
    """Held-out tokens of an evaluation; 0 for all."""
    checkpoint_every: Count = 250
    """Steps between checkpoints; the last step always makes one."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept."""
    keep_best: Natural = 1
    """Best checkpoints kept beside them."""
    best_metric: Literal["validation", "train"] = "validation"
    """What is best: the validation loss, or the smoothed training loss."""
    on_save_error: Literal["stop", "go-on"] = "stop"
    """When the disk refuses a checkpoint: stop with exit code 3, or say so and try again at the next one."""
    log_every: Count = 10
    """Steps between lines where there is no live panel."""
    stop_at_step: Count | None = None
    """Stop here with a checkpoint, the schedule unchanged; go on later with the same command."""
    tracker: Tracking | None = None
    """Who gets the figures beside the run's own journal; its package must be there."""
    tracker_project: str = "pocketlm"
    """The project that trackio or wandb files the run under."""


class SampleConfig(Section):
    """How the model speaks by default, and its samples while it trains."""

    temperature: NonNegative = 0.7
    """0 is greedy."""
    top_k: Natural = 0
    """Only the k likeliest tokens; 0 for all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that sum to p."""
    every: Natural = 0
    """Steps between samples; 0 for only the end."""
    max_new_tokens: Count = 64
    """Length of a training sample."""
    prompts: tuple[str, ...] = ()
    """What is completed."""


# Fields that may differ when a run goes on: they change what is measured, kept or said, and what is done about trouble.
FREE_FIELDS = frozenset(
    {"train.log_every", "train.eval_every", "train.eval_tokens", "train.checkpoint_every", "schedule.continue_lr"}
    | {"train.keep_last", "train.keep_best", "train.best_metric", "train.stop_at_step", "train.on_save_error"}
    | {
        "train.device",
        "train.engine",
        "train.strategy",
        "train.rank_timeout_s",
        "train.tracker",
        "train.tracker_project",
        "data.dir",
        "data.keep_segments",
    }
    | {"guard.spike_sigma", "guard.max_skips", "guard.max_rollbacks"}
    | {f"sample.{name}" for name in SampleConfig.model_fields}
)

# What fields were by default before `auto` was theirs. A run that was begun so keeps it: `auto` is resolved once.
BEFORE_AUTO = {"train.loss_chunk": 1024}

# How many steps, in which legs: what may differ here when a run goes on, training/more_steps.py says.
STEPS_FIELDS = frozenset({"train.total_steps", "schedule.continued_at", "schedule.continued_to", "schedule.begun_with"})


class Config(Section):
    """A whole run. Build it with `preset`, `from_toml` or `build`; it never changes afterwards."""

    name: str = "run"
    """The run's name; `runs/NAME` is its folder unless --out is given."""
    model: ModelConfig = ModelConfig()
    init: InitConfig = InitConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    guard: GuardConfig = GuardConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()

    @property
    def rows_per_step(self) -> int:
        """Rows of `data.context` tokens in one optimizer step."""
        return self.train.tokens_per_step // self.data.context

    @classmethod
    def preset(cls, name: str, overrides: Mapping[str, Any] | None = None) -> Config:
        """The named preset, changed by `overrides` (dotted names to values).

        Raises:
            UsageError: no preset of that name.
            ConfigError: overrides that do not fit.
        """
        return cls.build(preset_tree(name), overrides)

    @classmethod
    def from_toml(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
        """The configuration in a TOML file; a `preset = "NAME"` line in it names what it starts from.

        Raises:
            FileError: the file cannot be read.
            ConfigError: the file is no TOML, or its fields do not fit.
        """
        try:
            tree = read_toml(path)
        except FileError as error:
            raise type(error)(f"{error}; give a preset ({preset_names()}) or a .toml file") from None
        base = preset_tree(str(tree.pop("preset"))) if "preset" in tree else {}
        tree.setdefault("name", path.stem)
        return cls.build(merged(base, tree), overrides)

    @classmethod
    def build(cls, tree: Tree, overrides: Mapping[str, Any] | None = None) -> Config:
        """Checks a tree of plain values, with dotted `overrides` laid over it.

        Raises:
            ConfigError: every unknown key (with the nearest name), wrong value and clash, one line each.
        """
        given = dict(flat(tree)) | {_field_name(name): value for name, value in (overrides or {}).items()}
        unknown = [unknown_field(name, FIELDS) for name in given if name not in FIELDS]
        known = {name: None if value == "none" else value for name, value in given.items() if name in FIELDS}
        try:
            config = cls.model_validate(nested(known))
        except ValidationError as error:
            raise ConfigError(*unknown, *problems(error)) from None
        if wrong := [*unknown, *clashes(config)]:
            raise ConfigError(*wrong)
        return config

    def tree(self) -> Tree:
        """Plain nested values without the empty ones, as TOML holds them."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_toml(self) -> str:
        """The whole configuration as TOML; `build(tomllib.loads(text))` gives it back."""
        return tomli_w.dumps(self.tree())

    def differences(self, other: Config) -> list[str]:
        """Lines `field: mine, theirs` for every field that changes the result; the steps have a rule of their own."""
        changed = differing([self, other]).items()
        binding = {name: values for name, values in changed if name not in FREE_FIELDS | STEPS_FIELDS}
        binding = {name: values for name, values in binding.items() if values != ["auto", BEFORE_AUTO.get(name)]}
        return [f"{name}: {mine}, {theirs}" for name, (mine, theirs) in binding.items()]

    def decided(self) -> dict[str, Any]:
        """Every field, by its dotted name; of what the configuration alone decides, the decision."""
        data = self.data
        decided = {
            "data.stream": "on" if data.streams else "off",
            "data.shuffle": data.order,
            "data.val_tokens": data.validation_tokens,
        }
        return dict(flat(self.model_dump())) | decided


def differing(configs: Sequence[Config]) -> dict[str, list[Any]]:
    """The fields, but for the name, that are not the same in all of them: each one's values, in their order."""
    trees = [config.decided() for config in configs]
    values = {name: [tree[name] for tree in trees] for name in FIELDS if name != "name"}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def _fields(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{name}.")
        else:
            yield prefix + name


FIELDS = tuple(_fields(Config))


def _field_name(flag: str) -> str:
    return flag.replace("-", "_")
