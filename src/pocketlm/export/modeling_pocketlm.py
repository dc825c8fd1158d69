"""A pocketlm model for transformers: this file lies in the model's folder, beside its config.json, and needs no other.

transformers runs it where it is told `trust_remote_code=True`. pocketlm itself does not: it writes this file into the
folders of models for which transformers has no class of its own (parallel blocks, learned positions, a soft-cap ...),
and reads their weights by their names.

    ids (B, T) -> embed -> x (B, T, C) -> [block] x L -> norm -> head -> logits (B, T, V)

    sequential block      x = x + attention(norm(x));  x = x + mlp(norm'(x))
    parallel block        x = x + attention(norm(x)) + mlp(norm(x))
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class PocketLMConfig(PretrainedConfig):
    """The fields of pocketlm's section [model]; its documentation says what they mean."""

    model_type = "pocketlm"

    def __init__(
        self,
        vocab_size=50257,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        block="sequential",
        position="rope",
        rope_theta=10000.0,
        rope_llama3=None,
        norm="rms",
        norm_eps=1e-5,
        mlp="swiglu",
        bias=False,
        qk_norm=False,
        logit_softcap=None,
        tie_word_embeddings=True,
        **others,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.block = block
        self.position = position
        self.rope_theta = rope_theta
        self.rope_llama3 = rope_llama3
        self.norm = norm
        self.norm_eps = norm_eps
        self.mlp = mlp
        self.bias = bias
        self.qk_norm = qk_norm
        self.logit_softcap = logit_softcap
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)


def make_norm(config):
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


def rotary_table(config, positions, dtype):
    """cos and signed sin of position x frequency, each (B, T, 1, D); made in fp32, whatever the model computes in."""
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**pairs
    if config.rope_llama3 is not None:  # apply_scaling of https://github.com/meta-llama/llama-models
        factor, low, high, original_context = config.rope_llama3
        turns = original_context / (2 * math.pi / frequencies)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - kept) * frequencies / factor + kept * frequencies
    angles = (positions.float()[..., None] * frequencies)[:, :, None]  # (B, T, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x, rotary):
    """Turns each pair (x_i, x_{i+D/2}) of x (B, T, heads, D)."""
    cos, sin = rotary
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def visible(attention_mask, start, T, device):
    """Which of all keys each of T new queries sees: (B or 1, 1, T, start + T); None where the kernel's own triangle
    is enough."""
    padded = attention_mask is not None and not bool(attention_mask.all())
    if not padded and (start == 0 or T == 1):
        return None
    keys, queries = torch.arange(start + T, device=device), torch.arange(start, start + T, device=device)[:, None]
    seen = (keys <= queries)[None, None]
    if padded:
        seen = seen & attention_mask[:, None, None, : start + T].bool()
    return seen | (keys == queries)  # what is padding sees itself: a softmax over nothing is none


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim, self.qk_norm = layer, config.head_dim, config.qk_norm
        C, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        D = config.head_dim
        self.q_proj = nn.Linear(C, H * D, bias=config.bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.bias)
        if self.qk_norm:
            self.q_norm = nn.RMSNorm(D, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(D, eps=config.norm_eps)

    def forward(self, x, rotary, mask, cache):
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        C, inner = config.hidden_size, config.intermediate_size
        if self.kind == "swiglu":
            self.gate_proj = nn.Linear(C, inner, bias=config.bias)
        self.up_proj = nn.Linear(C, inner, bias=config.bias)
        self.down_proj = nn.Linear(inner, C, bias=config.bias)

    def forward(self, x):
        h = self.up_proj(x)
        if self.kind == "swiglu":
            return self.down_proj(F.silu(self.gate_proj(x)) * h)
        return self.down_proj(F.gelu(h, approximate="tanh") if self.kind == "gelu" else F.relu(h).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.parallel = config.block == "parallel"
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = make_norm(config)
        if not self.parallel:
            self.post_attention_layernorm = make_norm(config)

    def forward(self, x, rotary, mask, cache):
        h = self.input_layernorm(x)
        x = x + self.self_attn(h, rotary, mask, cache)
        return x + self.mlp(h if self.parallel else self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config)


class PocketLMForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = PocketLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _tied_weights_keys = None

    def __init__(self, config):
        super().__init__(config)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return None if self.config.tie_word_embeddings else self.lm_head

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **ignored,
    ):
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        start, T = 0 if past_key_values is None else past_key_values.get_seq_length(), x.shape[1]
        if position_ids is None:
            position_ids = torch.arange(start, start + T, device=x.device)[None]
        rotary = None
        if self.config.position == "rope":
            rotary = rotary_table(self.config, position_ids, x.dtype)
        else:
            x = x + self.model.embed_positions(position_ids)
        mask = visible(attention_mask, start, T, x.device)
        for block in self.model.layers:
            x = block(x, rotary, mask, past_key_values)
        x = self.model.norm(x)
        head = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = F.linear(x[:, kept], head)
        cap = self.config.logit_softcap
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
