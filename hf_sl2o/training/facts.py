"""What the processes of a training run must have in common: their arguments, as JSON values."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers.training_args import TrainingArguments

from ..foundation.ranks import as_json

#: Fields of the arguments that may differ from process to process, and why.
LOCAL_FIELDS = {
    "local_rank": "numbers the process",
    "output_dir": "a folder of the machine",
    "disable_tqdm": "only what is shown; its default follows the log level of the process",
    "log_level": "only what is shown",
    "log_level_replica": "only what is shown",
    "log_on_each_node": "only what is shown",
    "report_to": "only where logs go; its default is what is installed on the machine",
    "run_name": "only where logs go",
    "project": "only where logs go",
    "trackio_space_id": "only where logs go",
    "trackio_bucket_id": "only where logs go",
    "trackio_static_space_id": "only where logs go",
    "hub_token": "a secret of the user, and used by the first process alone",
    "dataloader_pin_memory": "only how a batch reaches the device",
}


def training_facts(args: TrainingArguments) -> dict[str, Any]:
    """Returns every argument that all ranks must share: all fields but those of `LOCAL_FIELDS`, as JSON values.

    Args:
        args (`TrainingArguments`): Or a subclass, whose fields are taken too.

    Example:

    ```python
    >>> from hf_sl2o import SL2OTrainingArguments
    >>> from hf_sl2o.training.facts import training_facts
    >>> facts = training_facts(SL2OTrainingArguments("out", use_cpu=True))
    >>> facts["optim"], facts["learning_rate"], facts["sl2o_dim"], "output_dir" in facts
    ('sl2o', 1.0, 40, False)
    ```
    """
    names = [field.name for field in dataclasses.fields(args) if not field.name.startswith("_")]
    names.sort(key=lambda name: name != "optim")  # the optimizer first: others take their defaults from it
    return {name: as_json(getattr(args, name)) for name in names if name not in LOCAL_FIELDS}


def patience(args: TrainingArguments) -> float:
    """Seconds to wait for the other ranks: five minutes, or `ddp_timeout` if that is shorter."""
    return float(min(args.ddp_timeout, 300))
