#!/usr/bin/env bash
# torch 2.13.0, its CPU build (on Linux: PIP_INDEX_URL=https://download.pytorch.org/whl/cpu), Python 3.11.
# Expected: a communication hook for DDP with the annotations that the documentation shows is accepted.
# Happens: in a file with `from __future__ import annotations` it is refused as wrongly annotated, since an annotation
# is text there; without annotations, or with an annotation that is the class itself, the same hook is accepted.
# What to do: leave the annotations of a hook out in such a file, or register a lambda around it.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy==2.4.6

cat > hooks.py <<'PY'
from __future__ import annotations

import torch
import torch.distributed as dist


def _done(bucket):
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def postponed(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return _done(bucket)


def bare(state, bucket):
    return _done(bucket)
PY

cat > now.py <<'PY'
import torch
import torch.distributed as dist

from hooks import _done, bare, postponed


def at_once(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return _done(bucket)


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
seen = {}
for hook in (at_once, bare, postponed):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    try:
        model.register_comm_hook(None, hook)
        seen[hook.__name__] = "accepted"
    except ValueError as error:
        seen[hook.__name__] = f"ValueError: {error}"
    print(f"{hook.__name__}: {seen[hook.__name__]}")
assert seen["at_once"] == seen["bare"] == "accepted", seen
assert seen["postponed"] == "ValueError: Communication hook: bucket annotation should be dist.GradBucket.", seen
dist.destroy_process_group()
PY
venv/bin/python now.py

# Expected output:
# at_once: accepted
# bare: accepted
# postponed: ValueError: Communication hook: bucket annotation should be dist.GradBucket.
