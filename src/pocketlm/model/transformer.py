"""The whole model: token ids in, logits out.

    ids (B, T) -> embed -> x (B, T, C) -> [block] x L -> norm -> x -> head -> logits (B, T, V)

    sequential block      x = x + attention(norm(x));  x = x + mlp(norm'(x))       Llama, Qwen3, GPT-2
    parallel block        x = x + attention(norm(x)) + mlp(norm(x))                PaLM, smallm

One decoder; every difference between the models that we train is a field of `ModelConfig` and an `if` below.
Parameters have Hugging Face's names, here and on disk, so that no file ever needs a table of names.

B sequences, T tokens, C hidden size, L layers, H query heads, K key-value heads, D head size, V vocabulary.
Papers: rotary positions arXiv:2104.09864, RMSNorm 1910.07467, SwiGLU 2002.05202, grouped queries 2305.13245,
parallel blocks 2204.02311 (section 2), query-key norm 2302.05442 (section 2).
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from pocketlm.config import ModelConfig
from pocketlm.field_types import AttentionKernel
from pocketlm.model.attention import folded_attention
from pocketlm.model.documents import Documents, documents_in
from pocketlm.model.norm import RMSNorm

Rotary = tuple[Tensor, Tensor]
Llama3Scaling = tuple[float, float, float, int]
"""As in `ModelConfig.rope_llama3`."""


class KVCache(Protocol):
    """The keys and values of the tokens already read; `generate/cache.py` has the real ones."""

    @property
    def length(self) -> int:
        """Tokens cached before this call: the position of the first new one."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's new k and v, each (B, K, T, D), and returns all of them, (B, K, length + T, D)."""

    def advance(self, num_tokens: int) -> None:
        """Called once all layers have appended: `length` grows."""


class Transformer(nn.Module):
    """The language model. Make one with `allocate`; `init_weights` or a file fills it.

    Args:
        vocab_rows: rows of the embedding and the head, by default V; those from V on are padding, and have no logits.
    """

    def __init__(self, config: ModelConfig, vocab_rows: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.document_end: int | None = None
        """The id after which, inside a row, attention and positions begin anew; None: they run through the row."""
        rows = vocab_rows or config.vocab_size
        self.model = Decoder(config, rows)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, rows, bias=False)

    @property
    def head(self) -> Tensor:
        """The output matrix (V or more, C): the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def use_attention(self, kernel: AttentionKernel) -> None:
        """Chooses what computes attention: PyTorch's kernel, or `attention.py`. They differ in rounding and speed."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.kernel = kernel

    def compile_blocks(self) -> None:
        """Lets PyTorch's compiler fuse what is between the products of a block, where gradients are wanted.

        Folded attention stays as it is: its order of passes is better than what the compiler makes of it.
        """
        as_it_is = torch.compiler.disable(folded_attention)  # type: ignore[no-untyped-call]
        compiled = torch.compile(run_layers, dynamic=False)
        for module in self.modules():
            if isinstance(module, Attention):
                module.folded = as_it_is
            elif isinstance(module, Block):
                module.run = compiled

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) int64 -> (B, T, C) after the final norm: what the head, or `loss.py`, multiplies.

        With a cache, T tokens may be read when it is empty (prefill) and one at a time afterwards. It holds one
        document: `document_end` has no say.
        """
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
        documents = None
        if self.document_end is not None and cache is None:
            documents = documents_in(ids, self.document_end, self.head.dtype)
        x: Tensor = self.model(ids, cache, recompute, documents)
        return x

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) int64 -> logits (B, T, V) in the weights' dtype. Training never makes them: see `loss.py`."""
        logits = F.linear(self.hidden(ids, cache), self.head[: self.config.vocab_size])
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class Decoder(nn.Module):
    """Everything but the head."""

    def __init__(self, config: ModelConfig, vocab_rows: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(vocab_rows, config.hidden_size)
        if config.position == "learned":
            self.embed_positions = embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config)

    def forward(self, ids: Tensor, cache: KVCache | None, recompute: bool, documents: Documents | None) -> Tensor:
        T = ids.shape[1]
        start = 0 if cache is None else cache.length
        assert start == 0 or T == 1, "several tokens after cached ones would need a mask; decode one at a time"
        positions = torch.arange(start, start + T, device=ids.device)

        x: Tensor = look_up(self.embed_tokens.weight, ids)  # (B, T, C)
        rotary = None
        if self.config.position == "rope":
            scaling = self.config.rope_llama3
            rotary = rotary_table(positions, self.config.head_dim, self.config.rope_theta, x.dtype, scaling)
            if documents is not None:
                rotary = rotary[0][documents.positions], rotary[1][documents.positions]  # (B, T, 1, D) each
        elif documents is not None:
            x = x + look_up(self.embed_positions.weight, documents.positions)
        else:
            x = x + self.embed_positions(positions)
        mask = documents.mask if documents is not None else None
        for block in self.layers:
            x = block(x, rotary, mask, cache, recompute)
        if cache is not None:
            cache.advance(T)
        x = self.norm(x)
        return x


class Block(nn.Module):
    """One layer: attention between tokens, then an MLP inside each."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.parallel = config.block == "parallel"
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = make_norm(config)
        if not self.parallel:
            self.post_attention_layernorm = make_norm(config)
        self.run = run_layers

    def forward(
        self, x: Tensor, rotary: Rotary | None, mask: Tensor | None, cache: KVCache | None, recompute: bool
    ) -> Tensor:
        if recompute:
            y: Tensor = checkpoint(self.run, self, x, rotary, mask, use_reentrant=False)
            return y
        run = self.run if cache is None and torch.is_grad_enabled() else run_layers
        return run(self, x, rotary, mask, cache)


def run_layers(
    block: Block, x: Tensor, rotary: Rotary | None, mask: Tensor | None, cache: KVCache | None = None
) -> Tensor:
    """What a block computes, as a function of it: compiling it once compiles all blocks, and leaves out their hooks."""
    h = block.input_layernorm(x)
    x = x + block.self_attn(h, rotary, mask, cache)
    if not block.parallel:
        h = block.post_attention_layernorm(x)
    x = x + block.mlp(h)
    return x


class Attention(nn.Module):
    """Causal self-attention; H / K query heads share each key-value head."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.kernel: AttentionKernel = "sdpa"
        self.folded = folded_attention
        self.head_dim = D = config.head_dim
        self.qk_norm = config.qk_norm
        C, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(C, H * D, bias=config.bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.bias)
        if self.qk_norm:
            self.q_norm = RMSNorm(D, eps=config.norm_eps)
            self.k_norm = RMSNorm(D, eps=config.norm_eps)

    def forward(self, x: Tensor, rotary: Rotary | None, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), (B, K, T, D) twice
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if self.kernel == "folded" and T > 1:
            y = self.folded(q, k, v, mask)  # (B, H, T, D)
        else:
            # is_causal aligns the triangle to the first key: right when queries and keys are the same tokens. One new
            # token after cached ones sees every key, and would with is_causal see only the first.
            causal = mask is None and T > 1
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)
        return out


class MLP(nn.Module):
    """Widen, bend, narrow. SwiGLU multiplies by a gate; GELU (tanh form) and squared ReLU have none."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        C, inner = config.hidden_size, config.intermediate_size
        if self.kind == "swiglu":
            self.gate_proj = nn.Linear(C, inner, bias=config.bias)
        self.up_proj = nn.Linear(C, inner, bias=config.bias)
        self.down_proj = nn.Linear(inner, C, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up_proj(x)  # (B, T, inner)
        if self.kind == "swiglu":
            h = F.silu(self.gate_proj(x)) * h
        elif self.kind == "gelu":
            h = F.gelu(h, approximate="tanh")
        else:
            h = F.relu(h).square()
        out: Tensor = self.down_proj(h)  # (B, T, C)
        return out


def make_norm(config: ModelConfig) -> nn.Module:
    """RMSNorm, or LayerNorm with a bias; both compute in fp32 inside when x is bf16."""
    kind = RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


def rotary_table(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, llama3: Llama3Scaling | None = None
) -> Rotary:
    """cos and signed sin of position x frequency, each (T, 1, D) in `dtype`; pair i turns by theta^(-2i/D) a token.

    Made in fp32 once per forward pass, for all layers, and kept nowhere: a buffer of angles would be rounded with the
    model to bf16, where position 257 is 256.
    """
    frequencies = rotary_frequencies(head_dim, theta, positions.device)
    if llama3 is not None:
        frequencies = llama3_scaled(frequencies, llama3)
    angles = torch.outer(positions.float(), frequencies)[:, None]  # (T, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotary_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """By how much each pair turns a token, (D/2,) fp32."""
    pairs = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    frequencies: Tensor = 1.0 / theta**pairs
    return frequencies


def llama3_scaled(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Rotary frequencies for a longer context, any shape, as Llama 3.1 has them.

    A pair that turns less than `low` times in the original context turns `factor` times slower, one that turns more
    than `high` times as before, and between them both are mixed. Nothing but the released code says so: `apply_scaling`
    of https://github.com/meta-llama/llama-models, models/llama3/model.py.
    """
    factor, low, high, original_context = scaling
    turns = original_context / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turns each pair (x_i, x_{i+D/2}) of x (B, T, heads, D): (a, b) -> (a cos - b sin, b cos + a sin).

    Halves, not neighbours, make the pairs, as in the released Llama and SmolLM2 weights.
    """
    cos, sin = rotary
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin  # rolled by half: (b, a)


def allocate(
    config: ModelConfig,
    *,
    vocab_rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """A model whose weights are memory not yet written, for those who fill every one: init, loading, copies.

    PyTorch's own random start would be thrown away, and costs up to a second per 100M parameters. Module.to_empty
    would import PyTorch's symbolic mathematics for it.
    """
    with torch.device("meta"):
        model = Transformer(config, vocab_rows)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            unwritten = torch.empty(tuple(parameter.shape), dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(unwritten))
    return model


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of an embedding: table (V, C), ids (B, T) -> (B, T, C)."""
    if table.itemsize == 2 and table.device.type == "cpu" and table.requires_grad:
        rows: Tensor = _LookUp.apply(table, ids)  # type: ignore[no-untyped-call]
        return rows
    return F.embedding(ids, table)


class _LookUp(torch.autograd.Function):
    """F.embedding, whose gradient in 16 bits on a CPU adds token by token to such a row: a common one's loses 2 %."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = table.shape
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        used, place = ids.flatten().unique(return_inverse=True)
        sums = torch.zeros(len(used), grad.shape[-1]).index_add_(0, place, grad.flatten(0, -2).float())
        table_grad = grad.new_zeros(ctx.shape)
        table_grad[used] = sums.to(grad.dtype)
        return table_grad, None


def embedding(rows: int, columns: int) -> nn.Embedding:
    """nn.Embedding without its random start, which on the meta device would import PyTorch's compiler: a second."""
    unwritten = torch.empty(rows, columns)
    module: nn.Embedding = nn.Embedding.from_pretrained(unwritten, freeze=False)  # type: ignore[no-untyped-call]
    return module
