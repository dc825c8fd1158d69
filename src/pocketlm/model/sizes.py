"""How large a model is and what it costs, by arithmetic alone: no weight is made, no framework imported.

    parameters            exact, by kind; a test holds them against the real module
    flops_per_token       6 N + 6 L T H D: forward and backward of N matrix weights, and of causal attention
    kv_cache_bytes_per_token
    training_memory       exact for what is kept per parameter, an estimate for what is kept per token

6 N: each weight of a matrix product multiplies and adds once forward and twice backward (arXiv:2001.08361, 2.1).
6 L T H D: queries x keys and weights x values take 2 x 2 T H D per token and layer over the full square, three times
that with the backward pass, and causality needs half of it. The output head counts; looking up an embedding does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pocketlm.config import Config, ModelConfig
from pocketlm.field_types import Dtype, Strategy

FOLDED_BLOCK = 128
FOLDED_KEPT_UP_TO = 1024
"""As in folded attention: queries in a block, and the longest row whose probabilities are kept."""
BACKWARD_BLOCKS, LOST = 1.0, 0.06
"""Blocks whose gradients are alive at once, and the share of activations lost between blocks of memory: as measured."""
LOST_TO_PARTS = 0.5
"""The same share in main memory where ranks share the state: parts of other sizes come and go between the activations,
and a heap that keeps what is freed falls into pieces. As measured of one model (docs/plan.md)."""
VOCAB_MULTIPLE = 64
"""Columns of logits in 16 bits are a multiple of it: matrix kernels of CPUs and GPUs are slow at odd widths."""

CPU_CHUNK, GPU_CHUNK_BYTES = 1024, 2**30
"""Rows of logits alive at once where a CPU computes, and what those of a GPU may take in fp32."""

Tensors = tuple[int, int, int]
"""How many of them there are, and the rows and columns of each; of a vector its values and 1."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by kind; `head` is zero when tied. Biases belong to their projection."""

    embedding: int
    positions: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """All of them, a tied embedding once."""
        return self.embedding + self.positions + self.attention + self.mlp + self.norms + self.head

    @property
    def non_embedding(self) -> int:
        """The blocks and the final norm: without token embedding, position table and head."""
        return self.attention + self.mlp + self.norms


def parameters(model: ModelConfig) -> Parameters:
    """Counts them."""
    C, L = model.hidden_size, model.num_hidden_layers
    norm = C if model.norm == "rms" else 2 * C
    num_norms = 1 + L * (1 if model.block == "parallel" else 2)
    qk_norms = 2 * model.head_dim * L if model.qk_norm else 0
    return Parameters(
        embedding=model.vocab_size * C,
        positions=model.max_position_embeddings * C if model.position == "learned" else 0,
        attention=sum(_projection(model, rows, columns) for rows, columns in _attention_shapes(model)) * L,
        mlp=sum(_projection(model, rows, columns) for rows, columns in _mlp_shapes(model)) * L,
        norms=num_norms * norm + qk_norms,
        head=0 if model.tie_word_embeddings else model.vocab_size * C,
    )


def block_matrix_parameters(model: ModelConfig) -> int:
    """Parameters of the matrices inside the blocks: all that Muon updates."""
    shapes = _attention_shapes(model) + _mlp_shapes(model)
    return sum(rows * columns for rows, columns in shapes) * model.num_hidden_layers


@dataclass(frozen=True)
class Team:
    """The processes that train together, its ranks."""

    ranks: int = 1
    strategy: Strategy = "ddp"
    """Whether each holds the whole state, or its rows of every tensor."""
    here: int = 1
    """Ranks that take from the same memory: on a CPU those of a host, of which each has its part."""

    @property
    def shares(self) -> bool:
        return self.ranks > 1 and self.strategy == "fsdp"


ALONE = Team()


def flops_per_token(model: ModelConfig, context: int) -> int:
    """Floating-point operations of training on one token in rows of `context` tokens."""
    N = block_matrix_parameters(model) + model.vocab_size * model.hidden_size
    attention = model.num_hidden_layers * context * model.num_attention_heads * model.head_dim
    return 6 * N + 6 * attention


def kv_cache_bytes_per_token(model: ModelConfig, bytes_per_value: int) -> int:
    """Bytes that one more token of context takes while generating."""
    return 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * bytes_per_value


def loss_chunk(config: Config, *, on_gpu: bool) -> int:
    """Rows of logits alive at once while training, 0 for all: as given, or what `auto` is there.

    Between two chunks the head's gradient is read and written in fp32, and a GPU runs out of work at the end of each
    product: it takes few and large ones. A CPU works on a few rows at a time anyway.
    """
    if config.train.loss_chunk != "auto":
        return config.train.loss_chunk
    rows = GPU_CHUNK_BYTES // (4 * config.model.vocab_size)
    return (rows // 64 + 1) * 64 if on_gpu else CPU_CHUNK  # a power of two of rows leaves no thin last chunk


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes by part on one device. The last three are estimates, held against measured runs (docs/plan.md).

    What a process takes before it has a model, some hundred megabytes, is not in them.
    """

    weights: int
    """fp32, the only ones that are stored."""
    gradients: int
    """fp32 sums over the micro-batches of a step; counted also for a step of one, which needs none in 16 bits."""
    moments: int
    """fp32; AdamW has two for each parameter, Muon one."""
    compute_copy: int
    """bf16 or fp16 weights and their gradients; nothing in fp32, or where ranks share the weights."""
    exchange: int
    """What ranks put together: fp32 sums of all gradients; where they share the state, a few tensors that are whole."""
    snapshot: int
    """Copies of weights and moments that are written while training goes on; on a GPU they are not on it.

    What the first rank alone has of them is dealt out to the ranks of its host.
    """
    activations: int
    """Estimate of what the backward pass needs of one micro-batch."""
    backward: int
    """Estimate of the gradients inside one block, and of what is lost between blocks of memory."""
    loss: int
    """Estimate of a chunk of logits, and of the head's gradient as a sum in fp32 and twice in `dtype`."""

    @property
    def per_parameter(self) -> int:
        """What does not depend on the rows at once."""
        return self.weights + self.gradients + self.moments + self.compute_copy + self.exchange + self.snapshot

    @property
    def total(self) -> int:
        """All of them."""
        return self.per_parameter + self.activations + self.backward + self.loss


def training_memory(
    config: Config,
    micro_batch: int,
    dtype: Dtype,
    *,
    folded: bool = False,
    snapshot: bool = False,
    on_gpu: bool = False,
    team: Team = ALONE,
) -> TrainingMemory:
    """What training takes of each rank with `micro_batch` rows of `data.context` tokens at once, computing in `dtype`.

    Args:
        folded: whether attention keeps its probabilities, as folded attention does in short rows.
        snapshot: whether checkpoints are written from copies on the same device.
        on_gpu: whether a GPU computes, which has a whole chunk of logits in fp32 beside those in `dtype`.
    """
    model, context, half = config.model, config.data.context, dtype != "fp32"
    size = 2 if half else 4
    num = _held(_tensors(model), team)
    num_muon = _held(_in_blocks(model), team) if config.optim.kind == "muon" else 0
    rows = micro_batch * context
    chunk = min(loss_chunk(config, on_gpu=on_gpu) or rows, rows)
    logit = size + 4 if on_gpu and half else size
    moments = 8 * num - 4 * num_muon
    keys = _keys_kept(context) if folded else 0
    activations = rows * activation_bytes_per_token(model, dtype, config.train.gradient_checkpointing, keys)
    activations += rows * document_bytes_per_token(model, dtype, context) if config.data.document_masks else 0
    block = rows * activation_bytes_per_token(model.model_copy(update={"num_hidden_layers": 1}), dtype, False, keys)
    return TrainingMemory(
        weights=4 * num,
        gradients=4 * num,
        moments=moments,
        compute_copy=4 * num if half and not team.shares else 0,
        exchange=_exchange(model, size, team),
        snapshot=_snapshot(model, moments, team) if snapshot else 0,
        activations=activations,
        backward=int(BACKWARD_BLOCKS * block + (LOST_TO_PARTS if team.shares and snapshot else LOST) * activations),
        loss=logit * chunk * model.vocab_size + (4 + 2 * size) * model.vocab_size * model.hidden_size,
    )


def _exchange(model: ModelConfig, size: int, team: Team) -> int:
    """Of one whose values compute in `size` bytes.

    A model whose rows are shared is put together in parts (PyTorch's `fully_shard`). What is in no block stays whole
    through forward and backward pass. Of blocks there are one at work, the next one and the gradients of one in the
    precision of the computation, and one's gradients in fp32, as they are summed. A head of odd width is copied.
    """
    if not team.shares:
        return 4 * parameters(model).total if team.ranks > 1 else 0
    block = parameters(model.model_copy(update={"num_hidden_layers": 1})).total - _outside_blocks(model)
    padded = model.vocab_size * model.hidden_size if size == 2 and model.vocab_size % VOCAB_MULTIPLE else 0
    return size * (_outside_blocks(model) + padded) + (3 * size + 4) * block


def _snapshot(model: ModelConfig, moments: int, team: Team) -> int:
    """The first rank copies whole weights, and all moments that there are or, like the others, its rows of them."""
    weights = 4 * parameters(model).total
    return -(-weights // team.here) + moments if team.shares else -(-(weights + moments) // team.here)


def _held(tensors: Iterable[Tensors], team: Team) -> int:
    """Values that a rank has at most of them: where they are shared, as many rows of each as the first one."""
    each = team.ranks if team.shares else 1
    return sum(count * -(-rows // each) * columns for count, rows, columns in tensors)


def _keys_kept(context: int) -> int:
    """Keys a query whose probabilities are kept: blocks of queries meet the keys up to their own end."""
    return (context + min(FOLDED_BLOCK, context)) // 2 if context <= FOLDED_KEPT_UP_TO else 0


def document_bytes_per_token(model: ModelConfig, dtype: Dtype, context: int) -> int:
    """Bytes per token of document masks, once for all layers: its row of the mask, and its own rotary angles."""
    size = 4 if dtype == "fp32" else 2
    return size * (context + (2 * model.head_dim if model.position == "rope" else 0))


def activation_bytes_per_token(
    model: ModelConfig, dtype: Dtype, gradient_checkpointing: bool, keys_kept: int = 0
) -> int:
    """Estimate of the bytes per token that the forward pass leaves for the backward pass.

    Per block: input and result of its norms, q, k and v as attention reads them and its result, the steps inside the
    MLP. With checkpointing: each block's input, and one block at a time in full. Blocks that are compiled keep less.

    Args:
        keys_kept: keys a query and head whose probabilities are kept.
    """
    C, size = model.hidden_size, 4 if dtype == "fp32" else 2
    rms = 3 if dtype == "fp32" and model.norm == "rms" else 2  # input, in fp32 normalised, result
    norm = C * rms * size
    heads = (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    block = norm * (1 if model.block == "parallel" else 2) + 2 * heads * size
    block += model.num_attention_heads * keys_kept * size
    block += model.intermediate_size * size * (4 if model.mlp == "swiglu" else 2)
    if model.qk_norm:
        block += heads * (rms - 1) * size  # the result is the q and k above
    if gradient_checkpointing:
        return norm + model.num_hidden_layers * C * size + block
    return norm + model.num_hidden_layers * block


def _tensors(model: ModelConfig) -> Iterator[Tensors]:
    """Every parameter."""
    C, L, num_norms = model.hidden_size, model.num_hidden_layers, 1 if model.block == "parallel" else 2
    yield 1 if model.tie_word_embeddings else 2, model.vocab_size, C
    if model.position == "learned":
        yield 1, model.max_position_embeddings, C
    yield (1 + L * num_norms) * (1 if model.norm == "rms" else 2), C, 1
    if model.qk_norm:
        yield 2 * L, model.head_dim, 1
    for count, rows, columns in _in_blocks(model):
        yield count, rows, columns + (1 if model.bias else 0)


def _in_blocks(model: ModelConfig) -> Iterator[Tensors]:
    """The matrices inside the blocks."""
    for rows, columns in _attention_shapes(model) + _mlp_shapes(model):
        yield model.num_hidden_layers, rows, columns


def _outside_blocks(model: ModelConfig) -> int:
    return parameters(model.model_copy(update={"num_hidden_layers": 0})).total


def _projection(model: ModelConfig, rows: int, columns: int) -> int:
    return rows * columns + (rows if model.bias else 0)


def _attention_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    C, D = model.hidden_size, model.head_dim
    H, K = model.num_attention_heads * D, model.num_key_value_heads * D
    return [(H, C), (K, C), (K, C), (C, H)]


def _mlp_shapes(model: ModelConfig) -> list[tuple[int, int]]:
    C, inner = model.hidden_size, model.intermediate_size
    gate = [(inner, C)] if model.mlp == "swiglu" else []
    return [*gate, (inner, C), (C, inner)]
