"""The closed forms against the real module, hand-computed numbers, and what autograd really keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pocketlm.config import Config, ModelConfig
from pocketlm.field_types import Dtype
from pocketlm.model import attention, sizes
from pocketlm.model.arithmetic import TORCH_DTYPES
from pocketlm.model.sizes import Team
from pocketlm.model.transformer import Transformer, allocate
from pocketlm.training.precision import Sums

PRESETS = {
    "debug": 26_816,
    "tiny": 2_115_264,
    "smallm": 20_535_808,
    "smollm2-135m": 134_515_008,
    "smollm2-135m-official": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def meta(model: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(model)


def counted(model: Transformer, *words: str) -> int:
    """Parameters whose name has one of the words."""
    return sum(p.numel() for name, p in model.named_parameters() if any(word in name for word in words))


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    small = st.integers(1, 6)
    kv_heads = draw(small)
    return ModelConfig(
        vocab_size=draw(st.integers(1, 99)),
        hidden_size=draw(st.integers(1, 40)),
        intermediate_size=draw(st.integers(1, 70)),
        num_hidden_layers=draw(small),
        num_attention_heads=kv_heads * draw(small),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(small),
        max_position_embeddings=draw(st.integers(1, 50)),
        block=draw(st.sampled_from(["sequential", "parallel"])),
        position=draw(st.sampled_from(["rope", "learned"])),
        norm=draw(st.sampled_from(["rms", "layer"])),
        mlp=draw(st.sampled_from(["swiglu", "gelu", "relu2"])),
        bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


@pytest.mark.parametrize(("preset", "total"), PRESETS.items())
def test_presets_have_their_published_sizes(preset: str, total: int) -> None:
    model = Config.preset(preset).model
    assert sizes.parameters(model).total == total
    assert counted(meta(model), "") == total


@settings(deadline=None, max_examples=40, derandomize=True)
@given(models())
def test_every_kind_of_parameter_is_counted(config: ModelConfig) -> None:
    count, model = sizes.parameters(config), meta(config)
    assert count.total == counted(model, "")
    assert count.embedding == counted(model, "embed_tokens")
    assert count.positions == counted(model, "embed_positions")
    assert count.attention == counted(model, "q_proj", "k_proj", "v_proj", "o_proj")
    assert count.mlp == counted(model, "gate_proj", "up_proj", "down_proj")
    assert count.norms == counted(model, "norm")
    assert count.head == counted(model, "lm_head")
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    assert sizes.block_matrix_parameters(config) == sum(p.numel() for p in matrices)


def test_smollm2_by_hand() -> None:
    model = Config.preset("smollm2-135m").model
    count = sizes.parameters(model)
    assert (count.embedding, count.attention, count.mlp) == (28_311_552, 30 * 884_736, 30 * 2_654_208)
    assert (count.norms, count.head, count.non_embedding) == (30 * 1_152 + 576, 0, 106_203_456)
    # 6 x (134,515,008 less 61 norms of 576) + 6 x 30 layers x 2,048 tokens x 9 heads x 64
    assert sizes.flops_per_token(model, 2048) == 6 * 134_479_872 + 6 * 35_389_440 == 1_019_215_872
    assert sizes.kv_cache_bytes_per_token(model, 2) == 2 * 30 * 3 * 64 * 2 == 23_040


def test_smallm_by_hand() -> None:
    model = Config.preset("smallm").model
    assert sizes.parameters(model).non_embedding == 8 * 950_528 + 256
    assert sizes.parameters(model).positions == 65_536
    assert sizes.kv_cache_bytes_per_token(model, 4) == 2 * 8 * 64 * 4


def test_untying_costs_parameters_and_no_flops() -> None:
    tied = ModelConfig()
    untied = ModelConfig(tie_word_embeddings=False)
    assert sizes.parameters(untied).total - sizes.parameters(tied).total == 50257 * 256
    assert sizes.parameters(untied).non_embedding == sizes.parameters(tied).non_embedding
    assert sizes.flops_per_token(untied, 64) == sizes.flops_per_token(tied, 64)


def test_training_memory_per_parameter() -> None:
    config = Config.preset("smollm2-135m")
    num = 134_515_008
    fp32, bf16 = (sizes.training_memory(config, 2, dtype) for dtype in ("fp32", "bf16"))
    assert (fp32.weights, fp32.gradients, fp32.moments, fp32.compute_copy) == (4 * num, 4 * num, 8 * num, 0)
    assert (bf16.weights, bf16.gradients, bf16.moments, bf16.compute_copy) == (4 * num, 4 * num, 8 * num, 4 * num)
    assert sizes.training_memory(config, 1, "bf16", snapshot=True).snapshot == 12 * num
    assert fp32.loss == 4 * 1024 * 49152 + (4 + 4 + 4) * 28_311_552
    assert bf16.loss == 2 * 1024 * 49152 + (4 + 2 + 2) * 28_311_552
    assert fp32.per_parameter == 16 * num
    assert fp32.total == 16 * num + fp32.activations + fp32.backward + fp32.loss


@settings(deadline=None, max_examples=40, derandomize=True)
@given(models(), st.integers(2, 9), st.sampled_from(["adamw", "muon"]))
def test_ranks_that_share_the_state_hold_rows_of_every_tensor(model: ModelConfig, ranks: int, kind: str) -> None:
    """The first has the most, as PyTorch cuts a tensor; in a step that is all that is kept, and no copy in bf16."""
    config = Config.preset("debug", {"optim.kind": kind}).model_copy(update={"model": model})
    parameters = dict(meta(model).named_parameters())
    own = {name: 4 * parameter.chunk(ranks)[0].numel() for name, parameter in parameters.items()}
    in_blocks = [name for name, parameter in parameters.items() if parameter.dim() == 2 and ".layers." in name]
    by_muon = sum(own[name] for name in in_blocks) if kind == "muon" else 0
    held = sizes.training_memory(config, 1, "bf16", snapshot=True, team=Team(ranks, "fsdp", ranks))
    assert held.weights == held.gradients == sum(own.values())
    assert held.moments == 2 * sum(own.values()) - by_muon
    assert held.compute_copy == 0
    whole = 4 * sum(parameter.numel() for parameter in parameters.values())
    assert 0 <= (held.snapshot - held.moments) * ranks - whole < ranks, "the first rank alone copies whole weights"


def test_ranks_with_the_whole_state_sum_all_gradients_in_fp32() -> None:
    config = Config.preset("tiny", {"optim.kind": "adamw"})
    model = allocate(config.model)
    alone, held = (
        sizes.training_memory(config, 3, "bf16", snapshot=True, team=team) for team in (Team(), Team(4, "ddp", 2))
    )
    sums = Sums(dict(model.named_parameters()))
    assert held.exchange == sum(bucket.nbytes for _, bucket in sums._buckets)
    assert alone.exchange == 0
    assert 2 * held.snapshot == alone.snapshot, "the first of two ranks on a host makes it"
    assert held.total == alone.total + held.exchange - held.snapshot


def test_eight_ranks_share_a_large_model_by_hand() -> None:
    config = Config.preset("smollm2-1.7b")
    held = sizes.training_memory(config, 1, "bf16", team=Team(8, "fsdp"))
    each = 4 * 1_711_376_384 // 8  # every tensor's rows are divisible
    assert (held.weights, held.gradients, held.moments, held.compute_copy) == (each, each, 2 * each, 0)
    # whole in bf16: embedding and last norm; of blocks two, one's gradients, and these in fp32
    assert held.exchange == 2 * (49152 * 2048 + 2048) + (2 + 2 + 2 + 4) * (4 * 2048**2 + 3 * 2048 * 8192 + 2 * 2048)
    odd = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 49153})})
    more = sizes.training_memory(odd, 1, "bf16", team=Team(8, "fsdp")).exchange - held.exchange
    assert more == 2 * 2048 + 2 * 49153 * 2048, "a row, and the head once more, with rows of zeros below"


def test_folded_attention_keeps_half_a_square_a_head() -> None:
    config = Config.preset("smollm2-135m", {"data.context": 512, "train.tokens_per_step": 1024})
    plain, folded = (sizes.training_memory(config, 1, "bf16", folded=folded) for folded in (False, True))
    # blocks of 128 queries meet 128, 256, 384 and 512 keys; 9 heads, 30 layers, 2 bytes
    assert folded.activations - plain.activations == 128 * (128 + 256 + 384 + 512) * 9 * 30 * 2
    longer = Config.preset("smollm2-135m")
    plain, folded = (sizes.training_memory(longer, 1, "bf16", folded=folded) for folded in (False, True))
    assert folded == plain, "above 1,024 tokens the probabilities are made again"


def test_memory_grows_with_the_rows_at_once() -> None:
    config = Config.preset("smallm")
    totals = [sizes.training_memory(config, rows, "bf16").total for rows in range(1, config.rows_per_step + 1)]
    assert totals == sorted(totals), "a search by bisection rests on it"


def test_muon_keeps_one_moment_of_the_matrices() -> None:
    config = Config.preset("tiny")
    count = sizes.parameters(config.model)
    matrices = count.attention + count.mlp  # no biases
    assert sizes.training_memory(config, 1, "fp32").moments == 4 * matrices + 8 * (count.total - matrices)


def test_the_loss_holds_no_more_rows_than_there_are() -> None:
    config = Config.preset("tiny")
    whole = Config.preset("tiny", {"train.loss_chunk": 0})
    assert sizes.training_memory(config, 1, "fp32").loss == sizes.training_memory(whole, 1, "fp32").loss
    assert sizes.training_memory(config, 9, "fp32").loss < sizes.training_memory(whole, 9, "fp32").loss


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"block": "parallel", "position": "learned"},
        {"qk_norm": True},
        {"norm": "layer"},
        {"mlp": "gelu"},
        {"mlp": "relu2"},
    ],
    ids=str,
)
def test_the_estimate_of_activations_is_what_autograd_keeps(fields: dict[str, str], dtype: Dtype) -> None:
    config = ModelConfig.model_validate({"vocab_size": 99, "num_key_value_heads": 2, "num_hidden_layers": 3} | fields)
    model = allocate(config).to(TORCH_DTYPES[dtype])
    assert sizes.activation_bytes_per_token(config, dtype, False) == pytest.approx(kept_per_token(model), rel=0.02)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_the_estimate_of_document_masks_is_what_autograd_keeps_more(position: str, dtype: Dtype) -> None:
    """One mask for all layers, whichever kernel; and in `training_memory` only where they are wanted."""
    config = ModelConfig.model_validate({"vocab_size": 99, "num_hidden_layers": 3, "position": position})
    model = allocate(config).to(TORCH_DTYPES[dtype])
    size = TORCH_DTYPES[dtype].itemsize
    shared = (
        2 * 64 * config.head_dim * size / (2 * 64) if position == "rope" else 0
    )  # angles of all rows, in their place
    for kernel in ("sdpa", "folded"):
        model.use_attention(kernel)
        model.document_end = None
        without = kept_per_token(model)
        model.document_end = 7
        more = kept_per_token(model) - without
        assert sizes.document_bytes_per_token(config, dtype, 64) == pytest.approx(more + shared, abs=16)
    run, masked = (Config.preset("smallm", {"data.document_masks": masks}) for masks in (False, True))
    before, after = (sizes.training_memory(each, 2, dtype).activations for each in (run, masked))
    assert after - before == 2 * 256 * 256 * size, "smallm has learned positions"


def kept_per_token(model: Transformer) -> float:
    """Bytes that autograd keeps of 2 rows of 64 tokens, the weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(torch.zeros(2, 64, dtype=torch.int64))
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / (2 * 64)


def test_checkpointing_keeps_a_fraction() -> None:
    model = Config.preset("smollm2-135m").model
    whole, recomputed = (sizes.activation_bytes_per_token(model, "bf16", on) for on in (False, True))
    assert recomputed < whole / 10


def test_what_is_kept_of_folded_attention_is_counted_by_its_own_numbers() -> None:
    assert (sizes.FOLDED_BLOCK, sizes.FOLDED_KEPT_UP_TO) == (attention.BLOCK, attention.KEPT_UP_TO)
