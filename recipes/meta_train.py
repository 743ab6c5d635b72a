"""Meta-trains the rules that ship with the package, and chooses them by validation; see `PLANS` in
hf_sl2o/experiments/plans.py.

    python recipes/meta_train.py --rule default --data PATH         # coefficients in whitened units
    python recipes/meta_train.py --rule default-lora --data PATH    # LoRA factors
    torchrun --nproc_per_node 2 recipes/meta_train.py --rule default --data PATH --use_cpu

`PATH` holds e2e_nlg/*.csv and cifar10/*.parquet; "embedded" needs no download. Killed and started again it goes on.
"""

from hf_sl2o.experiments.command_line.script import leave_processes, run_script
from hf_sl2o.experiments.plans import make_rule as main

if __name__ == "__main__":
    run_script(main)
    leave_processes()
