"""What rules and bases share: one config.json and one model.safetensors, on disk or on the Hub, loaded strictly."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .checked import shown
from .files import (
    CHECKSUM,
    check_finite,
    check_seal,
    checksum_of,
    json_writer,
    load_json,
    load_tensors,
    sealed,
    sha256_of,
    tensor_writer,
    write_atomically,
)
from .pieces import map_tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"

CARD = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

```python
{{ usage }}
```

Made with hf_sl2o, which trains networks with a learned optimizer in a small
subspace (SL2O, Chen et al., ECCV 2022). The two files hold numbers and settings only; nothing in them is executed.
{{ details }}
"""

# The last line of a card: a card that still has its checksum is ours, and nobody added to it.
_MADE = "<!-- hf_sl2o wrote this card; it is kept once you change it. {} -->\n"
_SHA256 = re.compile("[0-9a-f]{64}")

T = TypeVar("T", bound="HubFiles")


class HubFiles(ModelHubMixin, library_name="hf_sl2o", tags=["sl2o", "learned-optimizer"], model_card_template=CARD):
    """Adds `save_pretrained`, `from_pretrained` and `push_to_hub` to a class that can turn itself into files.

    Attributes:
        reads (`frozenset[str]`): Further arguments of `from_pretrained`; `"mapped"` is known.
    """

    reads: frozenset[str] = frozenset()

    def to_files(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Returns the config (JSON) and the tensors."""
        raise NotImplementedError

    @classmethod
    def from_files(cls: type[T], config: dict[str, Any], tensors: dict[str, torch.Tensor], where: str) -> T:
        """Makes the object; raises `ValueError` on anything unknown or missing."""
        raise NotImplementedError

    @staticmethod
    def settings_of(config: dict[str, Any]) -> dict[str, Any]:
        """Returns what config.json's checksum covers: all of it; a class leaves out keys that files may lack."""
        return config

    def card(self) -> dict[str, str]:
        """Returns title, summary, usage and details of the model card."""
        raise NotImplementedError

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        config: Any = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Writes config.json, model.safetensors and README.md, unless there is one that somebody wrote or changed.

        A full disk or a kill while they are written leaves what was there before; one between two renames leaves files
        that do not load, and say so. `config` is ignored, it is part of the mixin's signature.

        Returns:
            The URL of the commit with `push_to_hub=True`, else None.

        Raises:
            `ValueError`: a setting is NaN or Infinity (named); it could not be loaded again.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings, tensors = self.to_files()
        check_finite(folder / CONFIG, settings)
        weights = tensor_writer(tensors)

        def write_config(path: str) -> None:  # runs second, when the temporary weights are complete
            known = {**settings, "sha256": digest[0]}
            json_writer({**known, CHECKSUM: sealed(self.settings_of(known))[CHECKSUM]})(path)

        digest: list[str] = []

        def write_weights(path: str) -> None:
            weights(path)
            digest.append(sha256_of(path))

        write_atomically({folder / WEIGHTS: write_weights, folder / CONFIG: write_config})
        if _is_ours(folder / "README.md"):
            card = str(self.generate_model_card(**{**self.card(), **(model_card_kwargs or {})})).rstrip("\n") + "\n"
            text = card + _MADE.format(hashlib.sha256(card.encode()).hexdigest())
            write_atomically({folder / "README.md": lambda path: Path(path).write_bytes(text.encode())})
        if push_to_hub:
            return self.push_to_hub(repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)
        return None

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls: type[T],
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **unknown: Any,
    ) -> T:
        if others := sorted(unknown.keys() - cls.reads):
            raise TypeError(f"from_pretrained got unknown arguments {others}")
        paths = {}
        for name in (CONFIG, WEIGHTS):
            if Path(model_id).is_dir():
                paths[name] = Path(model_id) / name
                if not paths[name].is_file():
                    raise FileNotFoundError(
                        f"looked for a saved {cls.__name__} in the folder {model_id}, which has no {name}; give the "
                        "folder that `save_pretrained` wrote"
                    )
                continue
            try:
                paths[name] = Path(
                    hf_hub_download(
                        model_id,
                        name,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        local_files_only=local_files_only,
                        token=token,
                    )
                )
            except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
                raise FileNotFoundError(
                    f"looked for a saved {cls.__name__} at {model_id!r}: it is no local folder (here: {Path.cwd()}), "
                    f"and {name} of the Hub repository of that name (revision {revision or 'main'}) could not be had "
                    f"({type(error).__name__}: {str(error).strip().splitlines()[0]}); check the path, or log in with "
                    "`hf auth login` for a private repository"
                ) from error
        return cls._from_paths(paths[CONFIG], paths[WEIGHTS], **unknown)

    @classmethod
    def _from_paths(cls: type[T], settings: Path, weights: Path, mapped: bool = False) -> T:
        """What is wrong in itself is named first; then a change that leaves all well-formed."""
        config = load_json(settings, dict)
        sha256 = config.get("sha256", "")
        if sha256 != "" and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
            raise ValueError(
                f'{settings} has "sha256": {shown(sha256)}, expected the 64 hexadecimal digits of {WEIGHTS}; restore '
                "both files from one source"
            )
        tensors = (map_tensors if mapped else load_tensors)(weights, sha256=sha256 or None)
        rest = {key: value for key, value in config.items() if key not in ("sha256", CHECKSUM)}
        made = cls.from_files(rest, tensors, where=str(settings.parent))
        check_finite(settings, config)
        remedy = "restore it, or load it as it was, change it in Python and save it again"
        check_seal(settings, cls.settings_of(config), remedy)
        for key, needed in (("sha256", True), (CHECKSUM, checksum_of(weights) is not None)):
            if needed and key not in config:
                raise ValueError(f"{settings} lacks the key {key!r}; restore it from where it came from")
        return made

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[T],
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **unknown: Any,
    ) -> T:
        """Loads from a folder or a Hub repository; nothing from either is executed.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder written by `save_pretrained`, or `user/name`.
            force_download, token, cache_dir, local_files_only, revision: As in `huggingface_hub.hf_hub_download`.

        Raises:
            `FileNotFoundError`: nothing is there; says what was looked for where.
            `ValueError`: a file is truncated, tampered with, or holds unknown or missing entries.
        """
        # The mixin's own method reads config.json first and hides why it could not.
        return cls._from_pretrained(
            model_id=str(pretrained_model_name_or_path),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            **unknown,
        )


def take(config: dict[str, Any], keys: set[str], where: str) -> dict[str, Any]:
    """Returns `config` if it has exactly `keys`; raises `ValueError` naming the first difference."""
    for key in sorted(set(config) - keys):
        raise ValueError(
            f"config.json in {where} has an unknown key {key!r}; it was written by a newer hf_sl2o, or edited: "
            "upgrade, or remove the key"
        )
    for key in sorted(keys - set(config)):
        raise ValueError(f"config.json in {where} lacks the key {key!r}; restore it from where it came from")
    return config


def _is_ours(card: Path) -> bool:
    """Whether a card may be written: there is none, or the one there is as it was written."""
    if not card.exists():
        return True
    try:
        text = card.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    body, mark, end = text.rpartition(_MADE.partition("{}")[0])
    return bool(mark) and end == _MADE.format(hashlib.sha256(body.encode()).hexdigest()).removeprefix(mark)
