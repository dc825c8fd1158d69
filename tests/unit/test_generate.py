"""The engine against an oracle without a cache: every token is recomputed over a window kept by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pocketlm.config import InitConfig, ModelConfig
from pocketlm.errors import FileError
from pocketlm.generate import engine
from pocketlm.generate.cache import PreallocatedCache
from pocketlm.generate.engine import window_start
from pocketlm.generate.sampling import Sampling
from pocketlm.model.init import init_weights
from pocketlm.model.transformer import Transformer
from proof import Proof

GREEDY = Sampling(temperature=0)
TOO_CLOSE = 1e-4  # two best logits nearer than this may swap by rounding alone


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(*, context: int = 8, seed: int = 3, **fields: object) -> Transformer:
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    # Untied and wide, so that the text wanders and few steps are too close.
    fields = {**shape, "max_position_embeddings": context, "tie_word_embeddings": False, **fields}
    model = Transformer(ModelConfig(**fields))  # type: ignore[arg-type]
    init_weights(model, InitConfig(std=0.5), seed)
    return model.eval()


def generate(model: Transformer, prompt: list[int], num: int, seed: int = 0, **options: object) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    options = {"sampling": GREEDY, **options}
    return list(engine.generate(model, prompt, max_new_tokens=num, generator=generator, **options))  # type: ignore[arg-type]


def windows(tokens: list[int], limit: int, rule: str) -> Iterator[list[int]]:
    """The window after each token, kept by pushing one token after the other."""
    window: list[int] = []
    for token in tokens:
        if len(window) == limit:
            oldest = 1 if rule == "exact" else limit - limit // 2
            window = window[oldest:]
        window = [*window, token]
        yield window


def differences(model: Transformer, prompt: list[int], generated: list[int], rule: str) -> tuple[list[int], int]:
    """Steps at which the uncached model would have chosen otherwise, and how many were too close to compare."""
    limit = model.config.max_position_embeddings
    after_each = list(windows([*prompt, *generated], limit, rule))
    wrong, close = [], 0
    for step, token in enumerate(generated):
        window = after_each[len(prompt) - 1 + step]
        with torch.no_grad():
            best = model(torch.tensor([window]))[0, -1].topk(2)
        if best.values[0] - best.values[1] < TOO_CLOSE:
            close += 1
        elif token != best.indices[0]:
            wrong.append(step)
    return wrong, close


LAYOUTS = [
    {"block": block, "position": position, "num_attention_heads": 4, "num_key_value_heads": kv_heads}
    for block, position, kv_heads in itertools.product(("sequential", "parallel"), ("rope", "learned"), (4, 2, 1))
]


@pytest.mark.goal("R17")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda fields: "-".join(map(str, fields.values())))
@pytest.mark.parametrize("rule", ["halves", "exact"])
def test_cached_is_uncached_far_past_the_limit(
    layout: dict[str, object], rule: str, record_property: pytest.RecordProperty
) -> None:
    model = tiny(**layout)
    prompt = [1, 2, 3]
    generated = generate(model, prompt, 60, window=rule)
    wrong, close = differences(model, prompt, generated, rule)
    record_property("steps_too_close_to_compare", close)
    assert wrong == []
    assert close <= 3, f"{close} of 60 steps were too close to compare"
    assert len(set(generated)) >= 8  # a text that stands still would prove little


@pytest.mark.goal("R17")
def test_any_prompt_in_any_context_is_cached_as_it_is_uncached(proof: Proof) -> None:
    close = 0
    for case in proof.cases(40, 1000):
        rng = proof.random(case)
        context, rule = rng.choice([1, 2, 3, 5, 8, 16]), rng.choice(["halves", "exact"])
        model = tiny(context=context, seed=case, **rng.choice(LAYOUTS))
        length = rng.choice([1, context, rng.randint(1, 2 * context + 1)])
        prompt = [rng.randrange(40) for _ in range(length)]
        generated = generate(model, prompt, 20, window=rule)
        wrong, too_close = differences(model, prompt, generated, rule)
        assert (len(generated), wrong) == (20, [])
        close += too_close
    proof.note(f"two best logits within {TOO_CLOSE:g}, so not compared: {close} of {20 * proof.passed:,} tokens")
    assert close <= 0.05 * 20 * proof.passed


@pytest.mark.goal("R17")
@pytest.mark.parametrize(
    "options",
    [{"qk_norm": True}, {"bias": True, "norm": "layer", "mlp": "gelu"}, {"logit_softcap": 5.0, "mlp": "relu2"}],
)
def test_the_other_switches_are_cached_alike(options: dict[str, object]) -> None:
    model = tiny(**options)
    generated = generate(model, [5], 40)
    assert differences(model, [5], generated, "halves")[0] == []


@pytest.mark.goal("R17")
@pytest.mark.parametrize("context", [1, 2, 3, 7])
@pytest.mark.parametrize("rule", ["halves", "exact"])
def test_small_and_odd_contexts(context: int, rule: str) -> None:
    model = tiny(context=context)
    assert differences(model, [1], generate(model, [1], 20, window=rule), rule)[0] == []


@pytest.mark.goal("R17")
@pytest.mark.parametrize("rule", ["halves", "exact"])
@pytest.mark.parametrize("length", [7, 8, 9, 12, 13, 29])
def test_a_prompt_longer_than_the_context_follows_the_same_rule(length: int, rule: str) -> None:
    model = tiny()
    prompt = [i % 40 for i in range(length)]
    assert differences(model, prompt, generate(model, prompt, 12, window=rule), rule)[0] == []


@pytest.mark.goal("R17")
@pytest.mark.parametrize("rule", ["halves", "exact"])
def test_going_on_is_as_if_never_stopped(rule: str) -> None:
    model = tiny()
    whole = generate(model, [1], 40, window=rule)
    for cut in (1, 7, 8, 9, 23):
        assert generate(model, [1, *whole[:cut]], 40 - cut, window=rule) == whole[cut:]


@given(st.integers(1, 40), st.integers(1, 200), st.sampled_from(["halves", "exact"]))
def test_window_start_is_what_pushing_token_by_token_leaves(limit: int, num_tokens: int, rule: str) -> None:
    *_, window = windows(list(range(num_tokens)), limit, rule)
    assert window_start(num_tokens, limit, rule) == window[0]  # type: ignore[arg-type]
    assert len(window) <= limit
    if num_tokens > limit:
        assert len(window) >= (limit if rule == "exact" else limit // 2 + 1)


def test_one_run_over_half_a_window_for_every_half_window_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    hidden = Transformer.hidden

    def counted(model: Transformer, ids: torch.Tensor, cache: object = None) -> torch.Tensor:
        runs.append(ids.shape[1])
        return hidden(model, ids, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(Transformer, "hidden", counted)
    generate(tiny(), [1], 25)
    # 8 tokens fill the window; then every 4th token finds it full: 4 that stay are run, and the new one alone.
    assert runs == [1] * 8 + ([4] + [1] * 4) * 4 + [4, 1]


def test_a_stop_id_is_the_last_one_yielded() -> None:
    model = tiny()
    free = generate(model, [1], 20)
    stop = free[6]
    assert generate(model, [1], 20, stop_ids={stop}) == free[: free.index(stop) + 1]


def test_padded_ids_are_never_chosen() -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[30:] *= 100
    assert max(generate(model, [1], 30)) >= 30
    assert max(generate(model, [1], 30, num_ids=30)) < 30
    assert max(generate(model, [1], 30, num_ids=30, sampling=Sampling(temperature=5))) < 30


def test_no_new_tokens() -> None:
    assert generate(tiny(), [1, 2], 0) == []


def test_a_seed_repeats_a_draw() -> None:
    model = tiny()
    hot = Sampling(temperature=2)
    assert generate(model, [1], 30, sampling=hot, seed=5) == generate(model, [1], 30, sampling=hot, seed=5)
    assert generate(model, [1], 30, sampling=hot, seed=5) != generate(model, [1], 30, sampling=hot, seed=6)


def test_the_penalty_sees_the_prompt_and_what_left_the_window() -> None:
    strict = Sampling(temperature=0, repetition_penalty=1e30, repetition_rule="ctrl")
    generated = generate(tiny(), [1, 2, 3], 30, sampling=strict)
    assert len({1, 2, 3, *generated}) == 33  # context 8, vocabulary 40: no token comes twice


def test_weights_that_are_nan_are_refused() -> None:
    model = tiny()
    with torch.no_grad():
        model.head.fill_(float("nan"))
    with pytest.raises(FileError, match="nan"):
        generate(model, [1], 1)


def test_generating_leaves_gradients_and_training_as_they_were() -> None:
    model = tiny()
    generate(model, [1], 12)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert model.head.grad is not None


# --- the cache


@pytest.mark.goal("R17")
def test_the_cache_gives_the_logits_of_the_whole() -> None:
    model = tiny(num_attention_heads=4, num_key_value_heads=2)
    ids = torch.arange(16).view(2, 8)  # two sequences
    cache = PreallocatedCache(model.config, batch=2, capacity=8, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        steps = [model(ids[:, :5], cache), *(model(ids[:, t : t + 1], cache) for t in range(5, 8))]
        assert torch.allclose(torch.cat(steps, dim=1), model(ids), atol=1e-5)
    assert cache.length == 8


def test_the_cache_hands_out_views_and_forgets() -> None:
    config = tiny(num_attention_heads=4, num_key_value_heads=2).config
    cache = PreallocatedCache(config, batch=3, capacity=8, dtype=torch.bfloat16, device=torch.device("cpu"))
    k = torch.ones(3, 2, 5, 4, dtype=torch.bfloat16)
    keys, values = cache.append(1, k, 2 * k)
    assert (keys.shape, keys.dtype) == ((3, 2, 5, 4), torch.bfloat16)
    assert keys.data_ptr() == cache.keys[1].data_ptr()
    assert values.unique().tolist() == [2]
    assert cache.length == 0
    cache.advance(5)
    assert cache.append(1, k[:, :, :1], k[:, :, :1])[0].shape == (3, 2, 6, 4)
    with pytest.raises(AssertionError, match="9 tokens in a cache of 8"):
        cache.append(1, k[:, :, :4], k[:, :, :4])
    cache.reset()
    assert (cache.length, cache.capacity) == (0, 8)
