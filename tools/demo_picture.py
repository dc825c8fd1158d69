"""Draws the README's picture, docs/demo.svg: the loss of the demo's run, by the code that draws it in report.html.

make demo && python tools/demo_picture.py
"""

from __future__ import annotations

from pathlib import Path

from pocketlm.training.report import write_curve

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    write_curve(ROOT / "runs" / "tiny", ROOT / "docs" / "demo.svg")
