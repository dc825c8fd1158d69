"""Pages that need nothing beside them: a template and its values in one HTML file that asks no network for anything.

Every value is text to the page: the template escapes it, and a policy in its head forbids scripts and requests. Only
charts, which escape their own words, enter as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from pocketlm.training import curve


def render(template: str, values: Mapping[str, Any]) -> bytes:
    """The page of a template in this folder, as UTF-8; `style` is known to all of them."""
    environment = ImmutableSandboxedEnvironment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(_text(template)).render(values, style=Markup(_text("page.css") + curve.SVG_STYLE))
    return page.encode("utf-8", "replace")


def _text(name: str) -> str:
    return (resources.files("pocketlm.training") / name).read_text(encoding="utf-8")
