"""Model cards: text and metadata from what an object and its results say, and whose a card is."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

README, FIGURE = "README.md", "comparison.png"

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

```python
{{ usage }}
```
{% for head, text in sections %}
## {{ head }}

{{ text }}
{% endfor %}
Made with hf_sl2o {{ version }}, which trains networks with a learned optimizer in a small
subspace (SL2O, Chen et al., ECCV 2022). The two files hold numbers and settings only; nothing in them is executed.
{{ details }}
"""

#: What a card says, by name: its head, its sections under their own heads, and its end.
TEXTS = ("title", "summary", "usage", "training", "evaluation", "limits", "details")
_HEADS = {"training": "What it was made from", "evaluation": "How it was evaluated", "limits": "Limits"}
#: What the Hub reads, by name.
METADATA = tuple(
    name
    for name, parameter in inspect.signature(ModelCardData).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "ignore_metadata_errors"
)

# The last line of a card: a card that still has its checksum is ours, and nobody added to it.
_MADE = "<!-- hf_sl2o wrote this card; it is kept once you change it. {} -->\n"
_PNG = b"\x89PNG\r\n\x1a\n"


def make_card(base: ModelCardData, said: Mapping[str, Any]) -> ModelCard:
    """Makes a card.

    Args:
        base (`ModelCardData`): Metadata of every card of the class.
        said (`Mapping[str, Any]`): `TEXTS`, of which the first three are needed; `METADATA`, as for
            `huggingface_hub.ModelCardData` (tags are added to those of `base`); and `figure`, the path of a PNG image.

    Raises:
        `TypeError`: an entry has another name.
        `ValueError`: the client's own check of evaluation results refuses them.
    """
    if unknown := sorted(set(said) - {*TEXTS, *METADATA, "figure"}):
        raise TypeError(
            f"model_card_kwargs has {unknown[0]!r}, expected texts ({', '.join(TEXTS)}), the figure, or metadata "
            f"({', '.join(METADATA)})"
        )
    given = {name: said[name] for name in METADATA if said.get(name) is not None}
    known = {**base.to_dict(), **given, "tags": [*(base.tags or []), *given.get("tags", [])]}
    if "eval_results" in known:
        known.setdefault("model_name", said["title"])
    sections = {head: str(said.get(name) or "") for name, head in _HEADS.items()}
    if said.get("figure"):
        sections[_HEADS["evaluation"]] += f"\n\n![Losses of all arms]({FIGURE})"
    if licence := known.get("license_name") or known.get("license"):
        sections["Licence"] = str(licence)
    return ModelCard.from_template(
        card_data=ModelCardData(**known),
        template_str=TEMPLATE,
        sections=[(head, text.strip()) for head, text in sections.items() if text],
        version=_version(),
        **{name: said.get(name, "") for name in ("title", "summary", "usage", "details")},
    )


def _version() -> str:
    try:
        return metadata.version("hf_sl2o")
    except metadata.PackageNotFoundError:
        return "(of a checkout)"


def card_bytes(card: ModelCard) -> bytes:
    """Returns the bytes of a card that can be told from one that somebody changed."""
    text = str(card).rstrip("\n") + "\n"
    return (text + _MADE.format(hashlib.sha256(text.encode()).hexdigest())).encode()


def is_ours(card: Path) -> bool:
    """Whether a card may be written: there is none, or the one there is as it was written."""
    if not card.exists():
        return True
    try:
        text = card.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    body, mark, end = text.rpartition(_MADE.partition("{}")[0])
    return bool(mark) and end == _MADE.format(hashlib.sha256(body.encode()).hexdigest()).removeprefix(mark)


def read_card(path: Path) -> ModelCard:
    """Reads a card; raises `ValueError` if its metadata, the YAML between two lines of ---, cannot be read."""
    try:
        return ModelCard(path.read_bytes().decode())
    except Exception as error:  # the YAML parser's, a UnicodeDecodeError, a TypeError on keys that are no text
        what = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the metadata of {path} cannot be read ({what}); mend the YAML between the two lines of ---, or delete "
            "the file and a new card is written"
        ) from None


def read_figure(path: str | Path) -> bytes:
    """Returns the bytes of a figure; raises `ValueError` if they are no PNG image."""
    data = Path(path).read_bytes()
    if not data.startswith(_PNG):
        raise ValueError(f"the figure {path} is no PNG image; give one, or leave the figure out")
    return data
