"""pocketlm: train, understand and ship small language models on the hardware you have.

    pocketlm.load(MODEL)      -> a model with a tokenizer: .generate(prompt), .stream(prompt), .reply(messages), .model
    pocketlm.train(config)    -> trains, and returns the run's folder (the code is in pocketlm.training)
    pocketlm.Config           what a run is: Config.preset("tiny"), Config.from_toml(path)

Importing this package loads nothing heavy; each name is fetched when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocketlm.config import Config as Config
    from pocketlm.language_model import load as load
    from pocketlm.training.loop import train as train

__version__ = "0.1.0"
__all__ = ["Config", "__version__", "load", "train"]

_HOMES = {"Config": "pocketlm.config", "load": "pocketlm.language_model", "train": "pocketlm.training.loop"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'pocketlm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
