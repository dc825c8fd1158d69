"""The copy that computes: its padded vocabulary teaches and says nothing, and its gradients are the parameters'."""

from __future__ import annotations

import pytest
import torch

from pocketlm.config import InitConfig, ModelConfig
from pocketlm.model import arithmetic as file
from pocketlm.model.arithmetic import VOCAB_MULTIPLE, Arithmetic, computing, usable
from pocketlm.model.init import init_weights
from pocketlm.model.loss import linear_cross_entropy, token_losses
from pocketlm.model.transformer import Transformer, allocate, look_up
from pocketlm.training.precision import Precision

V = 101


def model_of(tied: bool) -> Transformer:
    config = ModelConfig.model_validate(
        {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    )
    model = allocate(config)
    init_weights(model, InitConfig(std=0.2), seed=0)
    return model


def rows(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(V, (num, 17), generator=torch.Generator().manual_seed(num))
    return ids[:, :-1], ids[:, 1:]


def backward(model: Transformer, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    hidden = model.hidden(inputs).flatten(0, 1)
    loss = linear_cross_entropy(hidden, model.head, targets.flatten(), scale=1 / targets.numel(), num_ids=V)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


@pytest.mark.parametrize("tied", [True, False])
def test_the_padded_copy_is_the_model_in_bf16(tied: bool) -> None:
    model = model_of(tied)
    copied, plain = computing(model, Arithmetic("bf16")), model_of(tied).bfloat16()
    assert copied.head.shape[0] == 2 * VOCAB_MULTIPLE
    inputs, targets = rows(3)
    assert copied(inputs).shape[-1] == V
    torch.testing.assert_close(copied(inputs), plain(inputs))
    losses = [backward(m, inputs, targets) for m in (copied, plain)]
    torch.testing.assert_close(losses[0], losses[1])
    for (name, mine), theirs in zip(copied.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad[: theirs.shape[0]], theirs.grad, rtol=2e-2, atol=1e-4, msg=name)
        assert not mine.grad[theirs.shape[0] :].any(), f"{name}: padding learns nothing"


def test_fp32_is_the_model_itself() -> None:
    model = model_of(True)
    assert computing(model, Arithmetic("fp32", "folded")) is model
    assert model.model.layers[0].self_attn.kernel == "folded"
    assert Precision(model, Arithmetic()).copies == {}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_micro_batches_are_summed_in_fp32(dtype: str) -> None:
    """Three of them, the oracle is each one's own gradient, summed in float64."""
    precision = Precision(model_of(False), Arithmetic("bf16" if dtype == "bf16" else "fp32"))
    expected: dict[str, torch.Tensor] = {}
    for num in (1, 2, 3):
        backward(precision.compute, *rows(num))
        for name, gradient in precision.gradients().items():
            expected[name] = expected.get(name, 0) + gradient.double()
        precision.drop_gradients()
    for num in (1, 2, 3):
        backward(precision.compute, *rows(num))
        precision.collect_gradients()
    for name, gradient in precision.gradients().items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_first_gradients_in_fp32_are_moved_from_between_the_activations() -> None:
    precision = Precision(model_of(True), Arithmetic("fp32"))
    for num in (1, 2, 3):
        backward(precision.compute, *rows(num))
        made = precision.gradients()
        precision.collect_gradients()
        for name, gradient in precision.gradients().items():
            assert (gradient.data_ptr() == made[name].data_ptr()) == (num > 1), name
            assert torch.equal(gradient, made[name])


def test_refresh_writes_the_copy_and_leaves_the_padding() -> None:
    precision = Precision(model_of(True), Arithmetic("bf16"))
    with torch.no_grad():
        for parameter in precision.model.parameters():
            parameter += 1
    precision.refresh()
    for name, parameter in precision.model.named_parameters():
        assert torch.equal(precision.copies[name], parameter.bfloat16()), name
    assert not precision.compute.head[V:].any()


def test_the_gradient_of_a_common_token_is_summed_before_it_is_rounded() -> None:
    """The oracle sums in float64; PyTorch's own bf16 look-up loses 2 % of it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, (4, 500), generator=generator)
    grad = torch.randn(4, 500, 16, generator=generator).bfloat16() + 1
    table = torch.zeros(V, 16, dtype=torch.bfloat16, requires_grad=True)
    look_up(table, ids).backward(grad)
    truth = torch.zeros(V, 16, dtype=torch.float64).index_add_(0, ids.flatten(), grad.flatten(0, 1).double())
    assert table.grad is not None
    assert torch.equal(table.grad, truth.float().bfloat16())


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_losses_on_the_padded_copy_are_those_without_padding(softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(40, 32, generator=generator), torch.randn(V, 32, generator=generator)
    targets = torch.randint(V, (40,), generator=generator)
    padded = torch.cat((head, torch.zeros(27, 32)))
    mine = token_losses(hidden, padded, targets, chunk=7, softcap=softcap, num_ids=V)
    torch.testing.assert_close(mine, token_losses(hidden, head, targets, softcap=softcap))


def test_what_another_machine_cannot_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Arithmetic("bf16", "folded", "medium")
    kept, why = usable(fast, torch.device("cuda"))
    assert kept == Arithmetic("bf16", "sdpa", "highest")
    assert "attention is sdpa, not folded" in why
    assert "medium, which rounds on a cuda" in why
    for error, precision in ((2e-7, "medium"), (2e-3, "highest")):
        monkeypatch.setattr(file, "fp32_error", lambda error=error: error)
        kept, why = usable(fast, torch.device("cpu"))
        assert kept == Arithmetic("bf16", "folded", precision)
        assert bool(why) is (precision == "highest")


def test_only_use_sets_the_precision_of_the_process() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        Precision(model_of(True), Arithmetic(fp32_matmul="medium"))
        assert torch.get_float32_matmul_precision() == "highest"
        Arithmetic(fp32_matmul="medium").use()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_folded_attention_recomputed_gives_the_same_gradients(dtype: str) -> None:
    gradients = []
    for recompute in (False, True):
        model = model_of(True)
        model.gradient_checkpointing = recompute
        precision = Precision(model, Arithmetic("bf16" if dtype == "bf16" else "fp32", "folded"))
        backward(precision.compute, *rows(3))
        gradients.append(precision.gradients())
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert torch.equal(gradient, gradients[1][name]), name
