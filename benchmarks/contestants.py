"""Who is measured, each in the loop that its own documentation shows. A contestant is named by its peer and flags:

    pocketlm                     what `pocketlm train` does, with the copies that it saves from; its flags: OUR_FLAGS
    transformers                 the Trainer's loop: fused AdamW, clipping by PyTorch
    litgpt                       the loop of `litgpt pretrain` over Fabric
    lightning                    a LightningModule around transformers' model, in Lightning's Trainer

    +bf16       autocast: Trainer(bf16=True), Fabric and Lightning's precision="bf16-mixed"
    +compile    torch.compile(model); `litgpt pretrain` does it always, the others on request
    +fused      litgpt: the fused AdamW, which its script asks for on CUDA only
    +malloc     the allocator's setting that pocketlm makes for itself (worker.py)

Without a flag a peer computes as it does when nothing is asked for, in fp32. All have the same architecture (GPT-2
where transformers has none like it), rows, threads, AdamW with one rate, decay on everything, and clipping.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pocketlm import machine
from pocketlm.config import Config, ModelConfig
from pocketlm.data.loader import Loader
from pocketlm.data.shards import open_dataset
from pocketlm.formats.huggingface import config_json
from pocketlm.model import sizes
from pocketlm.tensors import Copies
from pocketlm.training.resolve import resolve
from pocketlm.training.run import compile_if_wanted, new_state
from pocketlm.training.step import train_step
from worker import Boundary, Task

LR, BETAS, EPS, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
SEED = 0

OUR_FLAGS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {"train.dtype": "fp32"},
    "bf16": {"train.dtype": "bf16"},
    "eager": {"train.compile": "off"},
    "compile": {"train.compile": "on"},
}
"""What a flag of pocketlm changes in its configuration."""

Batch = tuple[Tensor, Tensor]


def config_of(task: Task, flags: Set[str] = frozenset()) -> Config:
    """The task as pocketlm's configuration."""
    fields: dict[str, Any] = {
        "data.context": task.context,
        "train.tokens_per_step": task.tokens,
        "train.micro_batch": task.rows,
        "train.threads": task.threads,
        "train.seed": SEED,
        "train.dtype": "auto",
        "train.total_steps": 5000,
        "schedule.kind": "constant",
        "schedule.warmup_steps": 0,
    }
    optim = {"kind": "adamw", "lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "decay": "all", "clip": CLIP}
    fields |= {f"optim.{name}": value for name, value in optim.items()}
    for flag in sorted(flags):
        fields |= OUR_FLAGS[flag]
    return Config.preset(task.preset, fields)


def pocketlm(task: Task, flags: Set[str], boundary: Boundary) -> None:
    config = config_of(task, flags)
    runtime = machine.start(config.train)
    resolved = resolve(config, runtime)
    state = new_state(config, resolved, runtime)
    loader = Loader(open_dataset(task.dataset).train, task.context, SEED, config.data.order)
    flops = sizes.flops_per_token(config.model, task.context)
    compile_if_wanted(state, config, resolved, lambda text: None)
    # What a run holds from its first save on: the copies that are written beside the steps.
    copies = Copies(), Copies()
    copies[0].of(dict(state.precision.model.named_parameters()))
    copies[1].of(state.tensors())
    boundary.ready(sum(p.numel() for p in state.precision.model.parameters()), flops)
    while True:
        boundary(train_step(state, loader, config, resolved.micro_batch).loss.item())


def transformers(task: Task, flags: Set[str], boundary: Boundary) -> None:
    model = transformers_model(config_of(task).model)
    made = counts(model, task)
    model = torch.compile(model) if "compile" in flags else model
    optimizer = adamw(model, fused=True)  # the Trainer's default, `adamw_torch_fused`
    boundary.ready(*made)
    for inputs, targets in batches(task):
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in flags):
            loss = model(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        boundary(loss.item())


def litgpt(task: Task, flags: Set[str], boundary: Boundary) -> None:
    from lightning.fabric import Fabric
    from litgpt.utils import chunked_cross_entropy

    model = litgpt_model(config_of(task).model, task)
    made = counts(model, task)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if "bf16" in flags else "32-true")
    fabric.launch()
    model = fabric.setup(torch.compile(model) if "compile" in flags else model)
    optimizer = fabric.setup_optimizers(adamw(model, fused="fused" in flags))
    boundary.ready(*made)
    for inputs, targets in batches(task):
        loss = chunked_cross_entropy(model(inputs), targets)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        boundary(loss.item())


def lightning(task: Task, flags: Set[str], boundary: Boundary) -> None:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Batch, _index: int) -> Tensor:
            inputs, targets = batch
            loss: Tensor = self.model(input_ids=inputs, labels=targets, shift_labels=targets).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self, fused=False)  # with autocast, Lightning refuses to clip for the fused one

    class Stepped(L.Callback):
        """Lightning has the loop; it waits where a batch begins. The time of a step ends where the next begins."""

        loss = None

        def on_train_batch_start(self, *_: Any) -> None:
            if self.loss is None:
                boundary.ready(*made)
            else:
                boundary(self.loss)

        def on_train_batch_end(self, _trainer: Any, _module: Any, outputs: Mapping[str, Tensor], *_: Any) -> None:
            self.loss = outputs["loss"].item()

    model = transformers_model(config_of(task).model)
    made = counts(model, task)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed" if "bf16" in flags else "32-true",
        gradient_clip_val=CLIP,
        max_epochs=1,
        callbacks=[Stepped()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(torch.compile(model) if "compile" in flags else model), batches(task))


PEERS: Mapping[str, Callable[[Task, Set[str], Boundary], None]] = {
    "pocketlm": pocketlm,
    "transformers": transformers,
    "litgpt": litgpt,
    "lightning": lightning,
}

FLAGS: Mapping[str, Set[str]] = {
    "pocketlm": set(OUR_FLAGS),
    "transformers": {"bf16", "compile", "malloc"},
    "litgpt": {"bf16", "compile", "fused", "malloc"},
    "lightning": {"bf16", "compile", "malloc"},
}


def unknown(name: str) -> str | None:
    """What is wrong with a contestant's name, if anything is: a flag that nobody reads must not stand in a table."""
    peer, *flags = name.split("+")
    if peer not in FLAGS:
        return f"{name}: no contestant {peer!r}; allowed are {', '.join(FLAGS)}"
    allowed = ", ".join(sorted(FLAGS[peer]))
    return None if set(flags) <= FLAGS[peer] else f"{name}: the flags of {peer} are {allowed}"


def adamw(model: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    """PyTorch's, with None where its own choice is left to it."""
    return torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True if fused else None
    )


def batches(task: Task) -> Iterator[Batch]:
    """Inputs and targets, each (rows, context) int64, for ever."""
    rows = np.load(task.batches, mmap_mode="r")
    assert rows.shape[1:] == (task.rows, task.context + 1)
    while True:
        for batch in rows:
            tokens = torch.from_numpy(batch.astype(np.int64))
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def transformers_model(model: ModelConfig) -> nn.Module:
    """The same Llama where pocketlm's is one; else a GPT-2 of equal size.

    smallm has parallel blocks, one key-value head and SwiGLU. GPT-2 at its width comes near its 20,535,808 parameters
    with a ninth layer and an MLP of 1,088 instead of 1,024: 20,335,168, one per cent fewer.
    """
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    tree = config_json(model, end_id=0)
    if tree["model_type"] == "llama":
        std = model.hidden_size**-0.5  # as the preset begins
        config = LlamaConfig(**{name: tree[name] for name in tree if "dtype" not in name}, initializer_range=std)
    else:
        widths = {"n_embd": model.hidden_size, "n_head": model.num_attention_heads, "n_inner": 1088, "n_layer": 9}
        no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        positions = model.max_position_embeddings
        config = GPT2Config(vocab_size=model.vocab_size, n_positions=positions, **widths, **no_dropout)
    config.use_cache = False
    network: nn.Module = AutoModelForCausalLM.from_config(config)
    return network.train()


def litgpt_model(model: ModelConfig, task: Task) -> nn.Module:
    """The same architecture with litgpt's own padding of the vocabulary; of positions it knows only the rotary kind."""
    from litgpt import GPT
    from litgpt import Config as LitConfig

    parallel = model.block == "parallel"
    config = LitConfig(
        block_size=task.context,
        vocab_size=model.vocab_size,
        n_layer=model.num_hidden_layers,
        n_embd=model.hidden_size,
        n_head=model.num_attention_heads,
        n_query_groups=model.num_key_value_heads,
        head_size=model.head_dim,
        intermediate_size=model.intermediate_size,
        parallel_residual=parallel,
        shared_attention_norm=parallel,
        rotary_percentage=1.0,
        rope_base=int(model.rope_theta),
        norm_class_name="RMSNorm",
        norm_eps=model.norm_eps,
        mlp_class_name="LLaMAMLP",
        bias=False,
    )
    network = GPT(config)
    network.apply(network._init_weights)  # as its docstring says
    network.transformer.wte.weight = network.lm_head.weight  # `litgpt pretrain --train.tie_embeddings true`
    return network


def counts(model: nn.Module, task: Task) -> tuple[int, float]:
    """Parameters, and FLOPs per token by the formula of `pocketlm.model.sizes`: 6 N + 6 L T H D."""
    config: Any = model.config
    layers = getattr(config, "num_hidden_layers", None) or config.n_layer
    heads = getattr(config, "num_attention_heads", None) or config.n_head
    head_dim = getattr(config, "head_size", None) or getattr(config, "head_dim", None) or config.n_embd // heads
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name]  # all heads are tied
    flops = 6 * sum(p.numel() for p in matrices) + 6 * layers * task.context * heads * head_dim
    return sum(p.numel() for p in model.parameters()), flops
