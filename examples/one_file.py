"""A language model, whole: text in, training, text out. Read it from the top.

    python examples/one_file.py FILE                  a tiny model of any text file, 20 steps, a second
    python examples/one_file.py FILE --steps 2000 --context 128 --hidden-size 128 --intermediate-size 384

    data       a file's bytes are the tokens; rows of them are read in a shuffled order that needs no list
    model      a Llama: embedding, layers of attention and MLP, the embedding again as the output
    loss       how surprised the model is by the true next token, with its gradient written out by hand
    training   rows -> loss -> gradients -> clipped -> AdamW, at a learning rate that rises and falls
    sampling   the model goes on with a prompt, one token at a time

Nothing here imports pocketlm, and `pocketlm train` gives the same losses, bit for bit, on the same text and settings:
tests/parity/test_one_file.py holds the two together. What the package adds is left out: checkpoints and resuming,
other tokenizers and models, bf16, Muon, a fast sampler. In the comments:
B rows, T tokens in a row, C hidden size, H query heads, K key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG2_E = math.log2(math.e)  # e^a = 2^(a LOG2_E), and processors are quicker at powers of 2
END, VOCAB_SIZE = 256, 257  # the tokens are the 256 bytes, and one that says that a text is over


@dataclass(frozen=True)
class Settings:
    """Every choice there is; each is a flag, --hidden-size 128."""

    hidden_size: int = 32
    intermediate_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    head_dim: int = 16
    norm_eps: float = 1e-5
    context: int = 32
    val_fraction: float = 0.05
    steps: int = 20
    rows_per_step: int = 8
    micro_batch: int = 8  # rows that go through the model at once: fewer take less memory for the same step
    seed: int = 0
    threads: int = 1
    lr: float = 1e-2
    weight_decay: float = 0.1
    clip: float = 1.0
    schedule: str = "cosine"  # or wsd
    warmup_fraction: float = 0.02
    start_factor: float = 0.1
    decay_fraction: float = 0.2  # wsd: share of the steps in which the rate falls
    prompt: str = "the "
    max_new_tokens: int = 64
    temperature: float = 0.7  # 0 always takes the likeliest token


def read_tokens(path: Path, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a file as training and validation tokens, each with END. (N,) int64 both.

    The end is held out, from a line start on: a loss on text that was trained on may only show what is known by heart.
    """
    text = path.read_bytes()
    block = int(min(max(val_fraction * len(text), 16_384), max(0.10, val_fraction) * len(text)))  # enough, not too much
    begin = len(text) - block
    cut = text.find(b"\n", begin - 1, begin + block // 2) + 1 or begin
    return np.array([*text[:cut], END], dtype=np.int64), np.array([*text[cut:], END], dtype=np.int64)


def read_batch(tokens: np.ndarray, settings: Settings, step: int) -> Tensor:
    """The rows of one step. (B, T + 1) int64: T inputs, and one more because the target of each is the next.

    Row r begins at token r * T. The g-th row ever read is row shuffled(g % N) of epoch g // N: a function of g, so
    there is no shuffled list to make or to save, and the rows of any step are found at once.
    """
    num_rows = (len(tokens) - 1) // settings.context
    rows = []
    for g in range(step * settings.rows_per_step, (step + 1) * settings.rows_per_step):
        epoch, index = divmod(g, num_rows)
        digest = hashlib.sha256(f"pocketlm order 1: {settings.seed} {epoch} 0".encode()).digest()
        begin = shuffled(index, num_rows, key=int.from_bytes(digest[:8], "little")) * settings.context
        rows.append(tokens[begin : begin + settings.context + 1])
    return torch.from_numpy(np.stack(rows))


def shuffled(index: int, size: int, key: int) -> int:
    """Where the shuffle `key` of 0 .. size - 1 sends `index`.

    A Feistel network, as in ciphers: half of the bits scrambles the other half, and they change places. Each round
    can be undone, so no two numbers land on the same one; who lands on `size` or above goes on until it is back.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        left, right = index >> half, index % 2**half
        for number in range(6):
            left, right = right, left ^ mix(right + key + number * 0x9E3779B97F4A7C15) % 2**half
        index = left << half | right
        if index < size:
            return index


def mix(value: int) -> int:
    """Scrambles 64 bits: the end of SplitMix64."""
    value %= 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


class Model(nn.Module):
    """Token ids in; out comes, for each position, a vector that says what is next."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, settings.hidden_size)
        self.layers = nn.ModuleList(Layer(settings) for _ in range(settings.num_hidden_layers))
        self.norm = nn.RMSNorm(settings.hidden_size, eps=settings.norm_eps)
        generator = torch.Generator().manual_seed(settings.seed)
        for weight in self.parameters():  # in the order in which they are made
            if weight.dim() == 1:  # a norm's scale
                nn.init.ones_(weight)
            else:  # so small that no token is favoured yet: the first loss is near ln V
                weight.data.normal_(generator=generator).mul_(0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)  # (B, T, C)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def loss(self, rows: Tensor, scale: float) -> Tensor:
        """`scale` times the summed nats of rows (B, T + 1). The output matrix is the embedding: tied weights."""
        hidden = self(rows[:, :-1]).flatten(0, 1)  # (B * T, C)
        return CrossEntropy.apply(hidden, self.embed_tokens.weight, rows[:, 1:].reshape(-1, 1), scale)


class Layer(nn.Module):
    """Attention moves information between tokens, the MLP works on each alone. Both only add to x, which flows on."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        C, D, inner = settings.hidden_size, settings.head_dim, settings.intermediate_size
        H, K = settings.num_attention_heads, settings.num_key_value_heads
        self.head_dim = D
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.gate_proj = nn.Linear(C, inner, bias=False)
        self.up_proj = nn.Linear(C, inner, bias=False)
        self.down_proj = nn.Linear(inner, C, bias=False)
        self.attention_norm = nn.RMSNorm(C, eps=settings.norm_eps)
        self.mlp_norm = nn.RMSNorm(C, eps=settings.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))  # SwiGLU: wider, gated, narrow again

    def attention(self, x: Tensor) -> Tensor:
        """Every token asks (q) itself and all before it (k), and takes up what fits (v)."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q), rotate(k)  # (B, T, H, D), (B, T, K, D)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, H, T, D), (B, K, T, D) twice
        # gqa: H / K query heads share a k and v. is_causal: a token that saw the next one would only copy it
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


def rotate(x: Tensor) -> Tensor:
    """Turns pair i of x (B, T, heads, D) by position * 10000^(-2i/D): then q times k depends on their distance only."""
    T, D = x.shape[1], x.shape[-1]
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, D, 2).float() / D)  # (D/2,)
    angles = torch.outer(torch.arange(T).float(), frequencies)[:, None]  # (T, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class CrossEntropy(torch.autograd.Function):
    """scale * sum of -ln p(target) with p = softmax(x W^T), for rows x (N, C), head W (V, C), targets t (N, 1).

    Autograd could find the gradient; by hand it is one formula: d loss / d logits = scale * (p - onehot(t)). Pull the
    true token up, push every other down as far as the model believed in it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, t: Tensor, scale: float) -> Tensor:
        z = x @ W.t()  # (N, V)
        z = torch.add(-LOG2_E * z.amax(1, keepdim=True), z, alpha=LOG2_E)  # the same p, of powers that do not overflow
        z_t, E = z.gather(1, t), z.exp2()
        others = E.scatter_(1, t, 0).sum(1, keepdim=True)
        s = z_t.exp2() + others  # p = E / s; the division is done below, on thinner matrices
        D = E.scatter_(1, t, -others)  # E - s * onehot(t), without subtracting what may be nearly equal
        dx, dW = (D @ W) * (scale / s), D.t() @ (x * (scale / s))
        ctx.save_for_backward(dx, dW)
        return ((s.log2() - z_t) / LOG2_E).sum() * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dW = ctx.saved_tensors
        return dx * grad, dW * grad, None, None


def lr_factor(settings: Settings, step: int) -> float:
    """Share of the peak rate: up while AdamW's averages are young, and down so that the weights come to rest."""
    warmup = int(settings.warmup_fraction * settings.steps)
    if step < warmup:
        return settings.start_factor + (1 - settings.start_factor) * step / warmup
    decay = settings.steps - warmup
    if settings.schedule == "wsd":  # warm-up, stable, decay: a straight line, and only at the end
        decay = max(1, min(decay, round(settings.decay_fraction * settings.steps)))
        return min(1.0, (settings.steps - step) / decay)
    return (1 - math.cos(math.pi * (settings.steps - step) / decay)) / 2


def train(model: Model, tokens: np.ndarray, settings: Settings) -> Iterator[tuple[float, float]]:
    """Trains in place; after each step gives its mean loss and the gradient's norm before clipping."""
    weights = list(model.parameters())
    groups = [  # decay pulls matrices towards zero; a norm's scale has no reason to go there
        {"params": [w for w in weights if w.dim() == 2], "weight_decay": settings.weight_decay},
        {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(settings.steps):
        losses = []
        for rows in read_batch(tokens, settings, step).split(settings.micro_batch):
            loss = model.loss(rows, scale=1 / (settings.rows_per_step * settings.context))
            loss.backward()  # adds to the gradients of the rows before
            losses.append(loss.detach())
        norm = torch.cat([w.grad.norm(dim=-1).flatten() for w in weights]).norm()  # of all gradients as one vector
        nn.utils.clip_grads_with_norm_(weights, settings.clip, norm)  # one strange batch must not throw the model far
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * lr_factor(settings, step)
        optimizer.step()
        optimizer.zero_grad()
        yield float(sum(losses)), float(norm)


@torch.no_grad()
def validation_loss(model: Model, tokens: np.ndarray, context: int) -> float:
    """Mean nats of every token but the first, in rows as in training and a shorter last one."""
    rows = (torch.from_numpy(tokens[i : i + context + 1])[None] for i in range(0, len(tokens) - 1, context))
    return sum(model.loss(row, scale=1.0).item() for row in rows) / (len(tokens) - 1)


@torch.no_grad()
def sample(model: Model, settings: Settings) -> str:
    """What the model writes after the prompt. It reads all again for each token; a cache would spare that."""
    generator = torch.Generator().manual_seed(settings.seed)
    ids = list(settings.prompt.encode()) or [END]
    begin = len(ids)
    for _ in range(settings.max_new_tokens):
        hidden = model(torch.tensor([ids[-settings.context :]]))[0, -1]  # (C,)
        logits = model.embed_tokens.weight @ hidden  # (V,)
        if settings.temperature == 0:
            token = int(logits.argmax())
        else:  # dividing by less than 1 stretches the differences: the likely becomes likelier
            token = int(torch.multinomial((logits / settings.temperature).softmax(0), 1, generator=generator))
        if token == END:
            break
        ids.append(token)
    return bytes(ids[begin:]).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small language model on a text file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON lines, with every digit")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    flags = vars(parser.parse_args())
    file, as_json, settings = flags.pop("file"), flags.pop("json"), Settings(**flags)

    torch.set_num_threads(settings.threads)  # threads share out sums: another number gives other last digits
    train_tokens, val_tokens = read_tokens(file, settings.val_fraction)
    if len(train_tokens) <= settings.context:
        sys.exit(f"{file} has {len(train_tokens)} training tokens, one row needs {settings.context + 1}")
    model = Model(settings)
    for step, (loss, norm) in enumerate(train(model, train_tokens, settings), 1):
        record = {"step": step, "loss": loss, "grad_norm": norm}
        print(json.dumps(record) if as_json else f"step {step:>6}  loss {loss:.4f}  norm {norm:.2f}")
    val_loss, text = validation_loss(model, val_tokens, settings.context), sample(model, settings)
    record = {"val_loss": val_loss, "text": text}
    print(json.dumps(record) if as_json else f"validation loss {val_loss:.4f}\n{settings.prompt}{text}")


if __name__ == "__main__":
    main()
