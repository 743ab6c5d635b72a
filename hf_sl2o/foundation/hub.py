"""What rules and bases share: one config.json and one model.safetensors, on disk or on the Hub, loaded strictly."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelCard, ModelHubMixin

from .cards import FIGURE, README, TEMPLATE, card_bytes, is_ours, make_card, read_card, read_figure
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
from .remote import MESSAGE, locate, push

CONFIG, WEIGHTS = "config.json", "model.safetensors"

#: The format of config.json. A file without `format_version` has this one; a later one is refused.
FORMAT_VERSION = 1

_SHA256 = re.compile("[0-9a-f]{64}")

T = TypeVar("T", bound="HubFiles")


class HubFiles(
    ModelHubMixin, library_name="hf_sl2o", tags=["sl2o", "learned-optimizer"], model_card_template=TEMPLATE
):
    """Adds `save_pretrained`, `from_pretrained` and `push_to_hub` to a class that can turn itself into files.

    Attributes:
        reads (`frozenset[str]`): Further arguments of `from_pretrained`; `"mapped"` is known.
        key (`str`): The key that config.json of this class has, and of no other one; `""`: it is not looked at.
    """

    reads: frozenset[str] = frozenset()
    key: str = ""

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
        """Returns the texts of the model card: title, summary, usage, and more of `cards.TEXTS`."""
        raise NotImplementedError

    def generate_model_card(self, **model_card_kwargs: Any) -> ModelCard:  # type: ignore[override]
        """Returns the model card; `model_card_kwargs` as in [`~HubFiles.save_pretrained`]."""
        of, own = model_card_kwargs.pop("fingerprint", None), getattr(self, "fingerprint", None)
        if of not in (None, own):
            raise ValueError(
                f"the card's results are of the fingerprint {shown(of)}, and this {type(self).__name__} has {own}; "
                "save the one that they are of, or give results of this one"
            )
        return make_card(self._hub_mixin_info.model_card_data, {**self.card(), **model_card_kwargs})

    def _card(self, repo_id: str | None, model_card_kwargs: dict[str, Any] | None) -> ModelCard:
        """With the true name in its code, where that is known."""
        usage = self.card()["usage"]
        if repo_id is not None and "/" in repo_id:
            usage = usage.replace("user/name", repo_id)
        return self.generate_model_card(**{"usage": usage, **(model_card_kwargs or {})})

    def _texts(
        self, folder: Path, repo_id: str | None = None, model_card_kwargs: dict[str, Any] | None = None
    ) -> dict[Path, bytes]:
        """The card and its figure; what is wrong with them is said before anything is written."""
        texts = {folder / README: card_bytes(self._card(repo_id, model_card_kwargs))}
        if figure := (model_card_kwargs or {}).get("figure"):
            texts[folder / FIGURE] = read_figure(figure)
        return texts

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

        Args:
            save_directory (`str` or `Path`): The folder; it is made.
            push_to_hub (`bool`, *optional*, defaults to `False`): Whether to push what was written, with the README.md
                that is there.
            repo_id (`str`, *optional*, defaults to the folder's name): Where to.
            model_card_kwargs (`dict[str, Any]`, *optional*): What the card says instead of, or beside, what
                [`~HubFiles.card`] has: texts (`title`, `summary`, `usage`, `training`, `evaluation`, `limits`,
                `details`), `figure` (the path of a PNG image, which is copied to comparison.png), and metadata, as
                `huggingface_hub.ModelCardData` takes them (`license`, `datasets`, `eval_results` and so on). With
                `fingerprint` it is refused by all but the rule or basis that has it.
            **push_to_hub_kwargs: As for [`~HubFiles.push_to_hub`].

        Returns:
            The URL of the commit with `push_to_hub=True`, else None.

        Raises:
            `ValueError`: a setting is NaN or Infinity (named); it could not be loaded again. Or the figure is no PNG,
                or the card that of another rule or basis.
            `TypeError`: `model_card_kwargs` has an unknown entry (named).
        """
        folder = Path(save_directory)
        settings, tensors = self.to_files()
        check_finite(folder / CONFIG, settings)
        texts = self._texts(folder, repo_id, model_card_kwargs)
        weights = tensor_writer(tensors)

        def write_config(path: str) -> None:  # runs second, when the temporary weights are complete
            known = {**settings, "sha256": digest[0]}
            json_writer({**known, CHECKSUM: sealed(self.settings_of(known))[CHECKSUM]})(path)

        digest: list[str] = []

        def write_weights(path: str) -> None:
            weights(path)
            digest.append(sha256_of(path))

        write_atomically({folder / WEIGHTS: write_weights, folder / CONFIG: write_config})
        if is_ours(folder / README):
            write_atomically({path: partial(_write, data=data) for path, data in texts.items()})
        if push_to_hub:
            own = None if is_ours(folder / README) else folder / README
            options = {"model_card_kwargs": model_card_kwargs, **push_to_hub_kwargs}
            return self._push(repo_id or folder.resolve().name, own, **options)
        return None

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        config: Any = None,
        commit_message: str = MESSAGE,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Commits what `save_pretrained` writes to a Hub repository, which is made if there is none.

        A README.md that somebody wrote or changed on the Hub stays as it is. `config` is ignored.

        Args:
            repo_id (`str`): `user/name`.
            commit_message (`str`, *optional*): Of the commit.
            private (`bool`, *optional*): Whether a new repository is private; by default as your account says. A
                public repository that is there is refused with `True`.
            token (`str` or `bool`, *optional*): By default that of `hf auth login` or HF_TOKEN.
            branch (`str`, *optional*, defaults to `"main"`): Where to; it is made.
            create_pr (`bool`, *optional*): Whether to open a pull request instead.
            model_card_kwargs (`dict[str, Any]`, *optional*): As for [`~HubFiles.save_pretrained`].

        Returns:
            The URL of the commit.

        Raises:
            `ValueError`: the metadata of the card are refused; nothing was sent.
            `PermissionError`: the token is missing, unknown or not enough.
            `ConnectionError`: the Hub cannot be reached.
        """
        return self._push(
            repo_id, None, model_card_kwargs, commit_message=commit_message, private=private, token=token,
            branch=branch, create_pr=create_pr,
        )  # fmt: skip

    def _push(
        self, repo_id: str, own_card: Path | None, model_card_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> str:
        with TemporaryDirectory() as made:
            folder = Path(made)
            self.save_pretrained(folder, repo_id=repo_id, model_card_kwargs=model_card_kwargs)
            if own_card is not None:
                read_card(own_card)
                shutil.copyfile(own_card, folder / README)
                if not (folder / FIGURE).exists() and (own_card.parent / FIGURE).is_file():
                    shutil.copyfile(own_card.parent / FIGURE, folder / FIGURE)
            return push(folder, repo_id, **options)

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
        subfolder: str = "",
        **unknown: Any,
    ) -> T:
        if others := sorted(unknown.keys() - cls.reads):
            raise TypeError(f"from_pretrained got unknown arguments {others}")
        file = locate(
            model_id, cls.__name__, subfolder, revision=revision, cache_dir=cache_dir, token=token,
            force_download=force_download, local_files_only=local_files_only,
        )  # fmt: skip
        settings = file(CONFIG)
        config = cls._read_config(settings)  # before the weights, which may be gigabytes of something else
        return cls._from_paths(settings, config, file(WEIGHTS), **unknown)

    @classmethod
    def _read_config(cls, path: Path) -> dict[str, Any]:
        config: dict[str, Any] = load_json(path, dict)
        version = config.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise ValueError(
                f'{path} has "format_version": {shown(version)}, this hf_sl2o reads {FORMAT_VERSION}: it was written '
                "by a newer one; pip install --upgrade hf_sl2o"
            )
        if cls.key and cls.key not in config:
            for other in HubFiles.__subclasses__():
                if other.key and other.key in config:
                    name = other.__name__
                    raise ValueError(
                        f"{path} is that of a {name}, not of a {cls.__name__}; use {name}.from_pretrained"
                    )
            for key in ("model_type", "architectures", "_class_name", "peft_type"):
                if key in config:
                    raise ValueError(
                        f"{path} is that of a model ({key} {shown(config[key])}), not of a {cls.__name__}; give the "
                        f"folder or the repository of one that {cls.__name__}.save_pretrained wrote"
                    )
        return config

    @classmethod
    def _from_paths(cls: type[T], settings: Path, config: dict[str, Any], weights: Path, mapped: bool = False) -> T:
        """What is wrong in itself is named first; then a change that leaves all well-formed."""
        sha256 = config.get("sha256", "")
        if sha256 != "" and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
            raise ValueError(
                f'{settings} has "sha256": {shown(sha256)}, expected the 64 hexadecimal digits of {WEIGHTS}; restore '
                "both files from one source"
            )
        tensors = (map_tensors if mapped else load_tensors)(weights, sha256=sha256 or None)
        rest = {key: value for key, value in config.items() if key not in ("sha256", CHECKSUM, "format_version")}
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
        subfolder: str = "",
        **unknown: Any,
    ) -> T:
        """Loads from a folder or a Hub repository; nothing from either is executed.

        Without the Hub, or where it refuses, what the cache has is used, and a warning says so. A commit hash as the
        revision asks the Hub for nothing that the cache has.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder written by `save_pretrained`, or `user/name`.
            force_download, token, cache_dir, local_files_only, revision: As in `huggingface_hub.hf_hub_download`.
            subfolder (`str`, *optional*, defaults to `""`): Where it is in the folder or the repository.

        Raises:
            `FileNotFoundError`: nothing is there, or it cannot be had; says what was looked for where, and why.
            `ValueError`: a file is truncated, tampered with, of something else, of a later format, or holds unknown or
                missing entries.
        """
        # The mixin's own method reads config.json first and hides why it could not.
        return cls._from_pretrained(
            model_id=str(pretrained_model_name_or_path),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            subfolder=subfolder,
            **unknown,
        )


def _write(path: str, data: bytes) -> None:
    Path(path).write_bytes(data)


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
