"""A fine-tune to and from a folder or the Hub: which files, and at which commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from ..foundation.files import load_json
from ..foundation.hub import CONFIG
from ..foundation.remote import Repository, locate
from ..optim import SubspaceOptimizer
from ..subspace import Basis
from .callbacks import unwrap_optimizer
from .finetuned import BASIS, FineTune, dtype_name, in_units_of

#: Where a Trainer puts the fine-tune beside ordinary weights.
SHARED = "sl2o"
#: The key of config.json there where d numbers do not say the weights; it takes the place of one pushed before.
WEIGHTS_ALONE = "weights_alone"


def save_finetuned(
    save_directory: str | Path,
    trained: Trainer | SubspaceOptimizer,
    base_model: nn.Module,
    *,
    basis: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> FineTune:
    """Writes a run as d coefficients, and sets the trained model to exactly the weights that they stand for.

    config.json and model.safetensors have under 2 kB together for d = 40; the basis is written beside them, in the
    folder `basis`, unless it is on the Hub. `.push_to_hub("user/name")` of what is returned uploads the same files.

    Args:
        save_directory (`str` or `Path`): The folder.
        trained (`Trainer` or [`SubspaceOptimizer`]): After training; an optimizer that was given the model.
        base_model (`nn.Module`): As it was before training, loaded anew; it stays as it is.
        basis (`str`, *optional*): Hub id of the basis. It is compared with the run's, and its commit is kept.
        revision, token (*optional*): Of that repository.

    Returns:
        [`FineTune`]: what was written.

    Raises:
        `ValueError`: there is no basis; another one at `basis`; the weights are not base model + lift(coefficients).

    Example:

    ```python
    >>> import torch
    >>> from hf_sl2o import Layout, RandomBasis, SubspaceOptimizer, load_finetuned, save_finetuned
    >>> model, base = torch.nn.Linear(30, 20), torch.nn.Linear(30, 20)
    >>> _ = base.load_state_dict(model.state_dict())
    >>> basis = RandomBasis(Layout.from_named_parameters(model.named_parameters()), dim=4)
    >>> optimizer = SubspaceOptimizer(model, basis, lambda c: torch.optim.SGD(c, lr=0.1))
    >>> model(torch.ones(2, 30)).sum().backward()
    >>> optimizer.step()
    >>> save_finetuned("shared", optimizer, base).coefficients.shape
    torch.Size([4])
    >>> torch.equal(load_finetuned(base, "shared").weight, model.weight)
    True
    ```
    """
    optimizer = unwrap_optimizer(trained.optimizer if isinstance(trained, Trainer) else trained)
    model: Any = trained.model if isinstance(trained, Trainer) else None
    if not isinstance(optimizer, SubspaceOptimizer):
        raise ValueError(
            f"{type(trained).__name__} has trained with {type(optimizer).__name__}, expected a SubspaceOptimizer: "
            "without a basis a fine-tune is its weights"
        )
    elsewhere: dict[str, Any] = {}
    if basis is not None:
        commit = commit_of(basis, revision=revision, token=token)
        there = Basis.from_pretrained(basis, revision=commit, token=token, mapped=optimizer.basis.may_stay_on_host)
        in_units_of(optimizer.basis.fingerprint, dtype_name(optimizer.basis), there)
        elsewhere = {"basis_id": basis, "basis_revision": commit}
    made = FineTune.settle(optimizer, base_model, model, **elsewhere)
    made.save_pretrained(save_directory)
    return made


def load_finetuned(
    base_model: nn.Module,
    pretrained_model_name_or_path: str | Path,
    *,
    basis: Basis | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Turns a base model into a fine-tuned one that is shared as coefficients: ordinary weights, to the bit.

    The weights are theta_0 + lift(c), in fp32 rounded once, in bf16 and fp16 once more. Which theta_0, which basis and
    which result is checked by sha256 before anything is changed; nothing from the folder or repository is executed.

    Args:
        base_model (`nn.Module`): What the run began with; a model with an adapter for a basis of an adapter. It is
            changed in place.
        pretrained_model_name_or_path (`str` or `Path`): A folder of [`save_finetuned`], a Hub id, or what
            [`SL2OTrainer`] has pushed.
        basis ([`Basis`], *optional*): The basis, where it is loaded already; several fine-tunes share one.
        revision, token, cache_dir, local_files_only (*optional*): As in `huggingface_hub.hf_hub_download`.

    Returns:
        `nn.Module`: `base_model`.

    Raises:
        `FileNotFoundError`: there is no fine-tune; says what was looked for where.
        `ValueError`: the base model or the basis is another one; a file is damaged, changed or of a later format.
        `TypeError`: `base_model` is no module.
    """
    if not isinstance(base_model, nn.Module):
        raise TypeError(
            f"base_model is {base_model!r:.80}, expected a model; load it first, as "
            "AutoModelForCausalLM.from_pretrained does"
        )
    place = str(pretrained_model_name_or_path)
    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    inside, commit = _find(place, revision=revision, **options)
    found: FineTune = FineTune.from_pretrained(place, subfolder=inside, revision=commit, **options)
    if basis is None and found.origin.basis_id is not None:
        basis = Basis.from_pretrained(found.origin.basis_id, revision=found.origin.basis_revision, **options)
    elif basis is None:
        beside = f"{inside}/{BASIS}" if inside else BASIS
        basis = Basis.from_pretrained(place, subfolder=beside, revision=commit, **options)
    return found.apply(base_model, basis)


def _find(place: str, **options: Any) -> tuple[str, str | None]:
    """Returns in which subfolder of a folder or a repository a fine-tune is, and the commit, None of a folder."""
    repository = None if Path(place).is_dir() else Repository(place, FineTune.__name__, **options)
    file = locate(place, FineTune.__name__) if repository is None else repository.file
    missing: list[FileNotFoundError] = []
    for inside in ("", SHARED):
        try:
            path = file(f"{inside}/{CONFIG}" if inside else CONFIG)
        except FileNotFoundError as error:
            missing.append(error)
            continue
        config = load_json(path, dict)
        if FineTune.key in config:
            return inside, None if repository is None else repository.commit
        if inside and WEIGHTS_ALONE in config:
            raise FileNotFoundError(
                f"looked for a fine-tune at {place!r}, which holds weights alone: d numbers do not say them, as a "
                "warning said when they were saved; load the weights with from_pretrained"
            )
    if len(missing) == 2:
        raise missing[0]
    raise FileNotFoundError(
        f"looked for a fine-tune at {place!r}: neither its {CONFIG} nor {SHARED}/{CONFIG} is one with the key "
        f"{FineTune.key!r}; give what save_finetuned wrote, or what SL2OTrainer pushed"
    )


def commit_of(repo: str, **options: Any) -> str | None:
    """The commit that a basis on the Hub is of, now; None of a folder.

    Args:
        repo (`str`): `user/name`, or a folder.
        **options: Of a [`Repository`]; with `local_files_only=True` it is the one that was loaded last.

    Raises:
        `FileNotFoundError`: there is none.
    """
    if Path(repo).is_dir():
        return None
    repository = Repository(repo, Basis.__name__, **options)
    repository.file(CONFIG)
    return repository.commit
