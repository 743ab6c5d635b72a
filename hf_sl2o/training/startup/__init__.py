"""For `PYTHONPATH`: Python runs its `sitecustomize` at the start, which knows our names (see `hf_sl2o.run`)."""
