"""Document masks: a row of several documents is those documents, each by itself.

The oracle is the model without masks, on one document after the other: logits, loss and gradients.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketlm.config import ModelConfig
from pocketlm.field_types import AttentionKernel
from pocketlm.generate import engine
from pocketlm.generate.sampling import Sampling
from pocketlm.model import attention
from pocketlm.model.arithmetic import Arithmetic, computing
from pocketlm.model.documents import documents_in
from pocketlm.model.transformer import Transformer, allocate

END = 7
LENGTHS = (5, 1, 9, 1, 1, 3)
"""Of the documents of a row, the end token in them; the last one has no end in the row."""
T = sum(LENGTHS)
BASE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": T,
}
LAYOUTS: dict[str, dict[str, object]] = {
    "llama": {},
    "smallm": {"block": "parallel", "position": "learned", "num_key_value_heads": 1},
    "qwen3": {"qk_norm": True, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "gpt2": {"position": "learned", "norm": "layer", "mlp": "gelu", "bias": True, "num_key_value_heads": 4},
    "parallel rope": {"block": "parallel", "num_key_value_heads": 1},
}
KERNELS: tuple[AttentionKernel, ...] = ("sdpa", "folded")


def lively(layout: str, dtype: torch.dtype = torch.float64, **fields: object) -> Transformer:
    """Large random weights everywhere, so that nothing can hide."""
    model = allocate(ModelConfig.model_validate(BASE | LAYOUTS[layout] | fields))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
    return model.to(dtype)


def row(seed: int = 4, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """The documents of a row, each (1, its length)."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(8, 61, (1, length), generator=generator) for length in lengths]
    for document in documents[:-1]:
        document[0, -1] = END
    return documents


def masked(model: Transformer) -> Transformer:
    model.document_end = END
    return model


def relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


def test_by_hand() -> None:
    ids = torch.tensor([[3, END, 4, 5, END, END, 6], [END, 1, 1, 1, 1, 1, END]])
    positions, mask = documents_in(ids, END, torch.bfloat16)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    assert (mask.shape, mask.dtype) == ((2, 1, 7, 7), torch.bfloat16)
    seen = [[[key for key in range(7) if mask[b, 0, query, key] == 0] for query in range(7)] for b in range(2)]
    assert seen[0] == [[0], [0, 1], [2], [2, 3], [2, 3, 4], [5], [6]]
    assert seen[1] == [[0], *([*range(1, query + 1)] for query in range(1, 7))]
    assert mask[mask != 0].isneginf().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_document_is_as_if_alone(layout: str, kernel: AttentionKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of other documents; every logit, and every gradient of the mean over all targets."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    model, rows = lively(layout), [row(), row(5, (2, 6, 12))]
    after = torch.tensor([[11], [12]])  # the last targets
    ids = torch.cat([torch.cat(documents, 1) for documents in rows])
    targets = torch.cat((ids, after), 1)[:, 1:]
    alone = [torch.cat([model(document) for document in documents], 1) for documents in rows]
    truth = torch.cat(alone)
    F.cross_entropy(truth.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()

    model.use_attention(kernel)
    logits = masked(model)(ids)
    torch.testing.assert_close(logits, truth, rtol=1e-10, atol=1e-10)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "error"), [("fp32", 1e-5), ("bf16", 0.05), ("fp16", 0.01)])
@pytest.mark.parametrize("layout", ["llama", "smallm"])
def test_in_each_precision(layout: str, dtype: str, error: float, kernel: AttentionKernel) -> None:
    """Against float64 without masks; in the copy that computes, as in training and in `pocketlm eval`."""
    documents = row()
    with torch.no_grad():
        exact = lively(layout, torch.float32).double()
        truth = torch.cat([exact(document) for document in documents], 1)
        model = computing(masked(lively(layout, torch.float32)), Arithmetic(dtype, kernel))
        ours, without = model(torch.cat(documents, 1)), exact(torch.cat(documents, 1))
    assert relative(ours, truth) < error
    assert relative(without, truth) > 0.1, "the masks would change nothing"


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_of_one_document_needs_no_mask(kernel: AttentionKernel) -> None:
    model, ids = lively("llama"), torch.randint(8, 61, (3, T), generator=torch.Generator().manual_seed(1))
    model.use_attention(kernel)
    torch.testing.assert_close(masked(lively("llama"))(ids), model(ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept_up_to", [0, 1024])
def test_folded_gradients_by_differences(kept_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 2)
    monkeypatch.setattr(attention, "KEPT_UP_TO", kept_up_to)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(2, heads, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    ids = torch.tensor([[1, END, 2, 3, 4], [1, 2, 3, END, 4]])
    mask = documents_in(ids, END, torch.float64).mask
    assert torch.autograd.gradcheck(attention.folded_attention, (q, k, v, mask))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["llama", "smallm"])
def test_recomputation_changes_no_bit(layout: str, kernel: AttentionKernel) -> None:
    ids, gradients = torch.cat(row(), 1), []
    for recompute in (False, True):
        model = masked(lively(layout, torch.float32))
        model.use_attention(kernel)
        model.gradient_checkpointing = recompute
        model(ids).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert gradient.any(), name
        assert torch.equal(gradient, gradients[1][name]), name  # type: ignore[arg-type]


# PyTorch's compiler warns of PyTorch's own parts, and hides what it does not mean.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled_blocks_are_compiled_once_for_all_rows(
    kernel: AttentionKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted is traced; it needs no compiler, which would take seconds."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, model = (masked(lively("llama", torch.float32)) for _ in range(2))
    for each in (eager, model):
        each.use_attention(kernel)
    model.compile_blocks()
    counters = torch._dynamo.utils.counters
    for seed, lengths in enumerate([LENGTHS, (T,), (1,) * T]):
        ids = torch.cat(row(seed, lengths), 1)
        model.hidden(ids).sum().backward()
        if seed == 0:
            compiled = counters["stats"]["unique_graphs"]
            assert compiled > 0
        torch.testing.assert_close(model.hidden(ids), eager.hidden(ids), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == compiled
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["llama", "smallm"])
def test_what_is_generated_has_seen_its_own_document_only(layout: str) -> None:
    """Greedy text through ends of documents, with a cache, is what the masks say token by token, without one."""
    model = masked(lively(layout, vocab_size=9, tie_word_embeddings=False))
    greedy, seen = Sampling(temperature=0), list[int]()
    for prompt in ([END], [3, 4, END], [3, END, 4], [END, END, 5, 6], [0], [1, 2], [2, END, 1], [4, 4]):
        num = T - len(prompt)
        text = list(engine.generate(model, prompt, greedy, max_new_tokens=num, generator=torch.Generator()))
        with torch.no_grad():
            said = model(torch.tensor([prompt + text]))[0].argmax(-1).tolist()
        assert text == said[len(prompt) - 1 : -1]
        seen += text[:-1]
    assert seen.count(END) > 1
    assert len(set(seen)) > 3, "a text that stands still would prove little"
