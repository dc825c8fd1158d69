"""How many samples of a model trained on Python are Python, as far as its tokenizer can tell.

    python tools/tokenizable.py runs/tiny

Completes each of the prompts below with several seeds, 200 tokens each, with the model's own sampling; cuts each text
after its last whole line; and counts those that Python's `tokenize` reads to the end: strings and brackets closed,
indentation consistent. It says nothing of sense.
"""

from __future__ import annotations

import io
import sys
import tokenize

PROMPTS = ("def read_file(path):", "class Parser:", "import os", "def main():", "class Connection(object):")
SEEDS = range(4)
NEW_TOKENS = 200


def whole_lines(text: str) -> str:
    """Without the last line, unless it is finished."""
    return text[: text.rfind("\n") + 1]


def is_tokenizable(text: str) -> bool:
    """Whether `tokenize` reads the text to its end."""
    try:
        for _ in tokenize.generate_tokens(io.StringIO(text).readline):
            pass
    except (tokenize.TokenError, SyntaxError):
        return False
    return True


def main() -> None:
    import pocketlm

    model = pocketlm.load(sys.argv[1] if len(sys.argv) > 1 else None)
    passed = []
    for prompt in PROMPTS:
        for seed in SEEDS:
            text = whole_lines(prompt + model.generate(prompt, max_new_tokens=NEW_TOKENS, seed=seed))
            passed.append(is_tokenizable(text))
            print(f"--- seed {seed}, {'tokenizes' if passed[-1] else 'does not tokenize'}\n{text}")
    print(f"{sum(passed)} of {len(passed)} samples tokenize")


if __name__ == "__main__":
    main()
