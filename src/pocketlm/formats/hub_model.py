"""A model on the Hub, OWNER/NAME[@REVISION]: its files in the client's cache, all of one commit, as a model folder.

Only files that pocketlm reads are fetched, never code or pickles, and weights last: a model that pocketlm does not have
is refused by its config.json.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

from pocketlm.errors import FileError
from pocketlm.formats.huggingface import model_config
from pocketlm.formats.huggingface_weights import INDEX, WEIGHTS, read_index
from pocketlm.reading import read_json

ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>\S+))?")
FILES = (".gguf", ".bin", ".json", ".toml", ".safetensors", ".pt", ".pth", ".ckpt")
BESIDE = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
LOCAL = "give a model folder that is here"


def is_hub_id(text: str) -> bool:
    """Whether a MODEL means a repository on the Hub: nothing of that name is here, nor a folder that it would be in."""
    if (match := ID.fullmatch(text)) is None or text.endswith(FILES):
        return False
    owner = match["repo"].partition("/")[0]
    return owner != "runs" and not os.path.lexists(text) and not os.path.lexists(owner)


def fetch_model(spec: str, *, weights: bool = True) -> Path:
    """The folder of a model in the cache, after what is missing there was fetched.

    Args:
        spec: of which `is_hub_id` is true.
        weights: whether they and the tokenizer are wanted, too.

    Raises:
        FileError: it is not there, cannot be fetched, or is no model that pocketlm reads.
    """
    from pocketlm.text.hub_file import hub_file  # its client takes a while to import

    match = ID.fullmatch(spec)
    assert match, spec
    repo, fetch = match["repo"], partial(hub_file, match["repo"], instead=LOCAL, kind=FileError)
    if (config := fetch("config.json", revision=match["revision"])) is None:
        raise FileError(f"{repo} on the Hub has no config.json; {LOCAL}")
    model_config(read_json(config))
    folder = config.parent
    if weights:
        fetch = partial(fetch, revision=folder.name)  # the commit: a branch may move between two requests
        found = {name: fetch(name) for name in ("tokenizer.json", *BESIDE, WEIGHTS)}
        if found[WEIGHTS] is None and (index := fetch(INDEX)):
            found[WEIGHTS] = index
            found |= {name: fetch(name) for name in sorted(set(read_index(index).values()))}
        if missing := [name for name, file in found.items() if file is None and name not in BESIDE]:
            raise FileError(f"{repo} on the Hub has no {missing[0]}, and pocketlm reads no pickles; {LOCAL}")
    return folder
