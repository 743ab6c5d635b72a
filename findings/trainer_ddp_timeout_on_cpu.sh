#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, Python 3.11 or newer.
# Expected: TrainingArguments(ddp_timeout=10) makes a process that waits for another one give up after 10 s.
# Happens: with use_cpu=True the process group is made without it (and without ddp_backend) and waits for 30
# minutes; without use_cpu, on the same machine without a GPU, it has the 10 s.
# What to do: leave use_cpu out where there is no GPU, or make the group first with
# torch.distributed.init_process_group(timeout=...).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=""

cat > timeout.py <<'PY'
import os
import socket
import sys

import torch
import torch.distributed as dist
from transformers import TrainingArguments

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
args = TrainingArguments("out", use_cpu=sys.argv[1] == "yes", ddp_backend="gloo", ddp_timeout=10)
assert args.device.type == "cpu"
group = dist.distributed_c10d._get_default_group()
print(int(group._get_backend(torch.device("cpu")).options._timeout.total_seconds()))
PY
with=$(venv/bin/python -W ignore timeout.py yes | tail -n 1)
without=$(venv/bin/python -W ignore timeout.py no | tail -n 1)
echo "ddp_timeout=10, use_cpu=True: $with s"
echo "ddp_timeout=10, use_cpu=False, no GPU: $without s"
[ "$with" = 1800 ] && [ "$without" = 10 ]

# Expected output:
# ddp_timeout=10, use_cpu=True: 1800 s
# ddp_timeout=10, use_cpu=False, no GPU: 10 s
