"""The package's own names: few, lazy, and the same however often they are used."""

from __future__ import annotations

from pathlib import Path

import pytest

import pocketlm


def test_train_and_load_work_twice_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = pocketlm.Config.preset("debug", {"train.total_steps": 2})
    for name in ("first", "second"):
        run = pocketlm.train(config, out=Path(name))
        model = pocketlm.load(run)
        assert model.generate("the ", max_new_tokens=5, seed=1) == model.generate("the ", max_new_tokens=5, seed=1)
        assert model.model(model.model.head.new_zeros(2, 3).long()).shape == (2, 3, config.model.vocab_size)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        pocketlm.nothing  # noqa: B018
    assert set(pocketlm.__all__) == {"Config", "load", "train", "__version__"}
