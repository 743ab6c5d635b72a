"""Restaurant meaning representations and sentences in the style of E2E, generated: the recipe needs no download.

>>> from hf_sl2o.experiments.data.e2e_embedded import generate
>>> rows = generate("train", 2)
>>> sorted(rows[0])
['mr', 'ref']
"""

from __future__ import annotations

import csv
import os
import random
import zlib
from pathlib import Path

_NAMES = """Amber Lantern, Bluebell Kitchen, Carrot Top, Dockside, Elm Court, Fig Tree, Golden Spoon, Harvest Moon,
Ivy House, Juniper, Kestrel Arms, Lemon Grove, Mill Race, Nutmeg, Olive Branch, Pear Orchard, Quayside, Red Kite,
Silver Fern, Tall Ship, Walnut Room""".replace("\n", " ").split(", ")
_NEAR = """Ash Bakery, Bridge Hotel, Corn Exchange, Drapers Inn, Eastgate Station, Ferry Landing, Guildhall,
Hope Chapel, Kings Market, Lantern Theatre""".replace("\n", " ").split(", ")
_SLOTS = {
    "eatType": ["restaurant", "pub", "coffee shop"],
    "food": ["Chinese", "English", "French", "Indian", "Italian", "Japanese", "Fast food"],
    "priceRange": ["cheap", "moderate", "high", "less than £20", "£20-25", "more than £30"],
    "customer rating": ["low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"],
    "area": ["city centre", "riverside"],
    "familyFriendly": ["yes", "no"],
    "near": _NEAR,
}
_PRICES = {
    "cheap": ["cheap prices", "low prices"],
    "moderate": ["moderate prices", "reasonable prices"],
    "high": ["high prices", "upmarket prices"],
    "less than £20": ["prices below £20", "meals for less than £20"],
    "£20-25": ["prices between £20 and £25", "meals for £20-25"],
    "more than £30": ["prices above £30", "meals for more than £30"],
}
_RATINGS = {
    "low": ["a low customer rating", "poor reviews"],
    "average": ["an average customer rating", "mixed reviews"],
    "high": ["a high customer rating", "excellent reviews"],
    "1 out of 5": ["a customer rating of 1 out of 5", "one star out of five"],
    "3 out of 5": ["a customer rating of 3 out of 5", "three stars out of five"],
    "5 out of 5": ["a customer rating of 5 out of 5", "five stars out of five"],
}
_AREAS = {
    "city centre": ["in the city centre", "in the centre of the city"],
    "riverside": ["by the riverside", "in the riverside area"],
}
_FAMILIES = {
    "yes": ["Families are welcome there.", "It is family friendly.", "You can bring the children."],
    "no": ["It is not family friendly.", "It is no place for children.", "Families should look elsewhere."],
}
# The remainder of an MR's checksum says which split it belongs to, whatever the seed and the number of rows.
_SPLITS = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'AEIOUaeiou' else 'a'} {phrase}"


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _meaning(rng: random.Random) -> dict[str, str]:
    chosen = set(rng.sample(list(_SLOTS), rng.randint(2, len(_SLOTS))))
    return {"name": rng.choice(_NAMES), **{slot: rng.choice(_SLOTS[slot]) for slot in _SLOTS if slot in chosen}}


def _sentence(meaning: dict[str, str], rng: random.Random) -> str:
    """Realises every slot: one sentence that says what and where the place is, the rest in one or two more."""
    name, kind = meaning["name"], meaning.get("eatType")
    what = kind or "place"
    if food := meaning.get("food"):
        food = "fast food" if food == "Fast food" else f"{food} food"
        what = rng.choice([f"{what} that serves {food}", f"{what} with {food}"])
    places = [rng.choice(_AREAS[meaning["area"]])] if "area" in meaning else []
    if "near" in meaning:
        places.append(f"{rng.choice(['near', 'close to', 'not far from'])} {meaning['near']}")
    rng.shuffle(places)
    where = " ".join(places)
    first = [f"{name} is {_article(what)} {where}", f"there is {_article(what)} called {name} {where}"]
    if where:
        first.append(f"{where} you will find {name}, {_article(what)}")
    sentences = [_capital(rng.choice(first).strip()) + "."]
    facts = [
        rng.choice(phrases[meaning[slot]])
        for slot, phrases in (("priceRange", _PRICES), ("customer rating", _RATINGS))
        if slot in meaning
    ]
    rng.shuffle(facts)
    if facts:
        subject = rng.choice(["It", "The " + (kind or "place")])
        sentences.append(f"{subject} has {' and '.join(facts)}.")
    if "familyFriendly" in meaning:
        sentences.insert(rng.randint(1, len(sentences)), rng.choice(_FAMILIES[meaning["familyFriendly"]]))
    return " ".join(sentences)


def generate(split: str, rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Returns rows with `mr` and `ref`; the same for the same arguments, and no MR is in two splits.

    Args:
        split (`str`): `"train"`, `"validation"`, or `"test"`.
        rows (`int`): At least 1.
        seed (`int`, *optional*, defaults to 0): Another seed gives other rows.

    Raises:
        `ValueError`: an unknown split, or fewer than one row.
    """
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {sorted(_SPLITS)}")
    if rows < 1:
        raise ValueError(f"rows is {rows}, expected at least 1")
    rng = random.Random(f"{split}-{seed}")
    made: list[dict[str, str]] = []
    while len(made) < rows:
        meaning = _meaning(rng)
        mr = ", ".join(f"{slot}[{value}]" for slot, value in meaning.items())
        if zlib.crc32(mr.encode()) % 10 in _SPLITS[split]:
            made += [
                {"mr": mr, "ref": _sentence(meaning, rng)} for _ in range(min(rng.randint(1, 3), rows - len(made)))
            ]
    return made


def write_csv(folder: str | Path, *, seed: int = 0, **rows: int) -> Path:
    """Writes a CSV a split, such as `write_csv("data", train=8000, validation=800, test=800)`; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, number in rows.items():
        temporary = folder / f".{split}.csv.partial"
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["mr", "ref"])
            writer.writeheader()
            writer.writerows(generate(split, number, seed))
        os.replace(temporary, folder / f"{split}.csv")
    return folder
