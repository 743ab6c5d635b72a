"""What learned rules do, said in another way: `symbolic` finds expressions for the updates of a rule.

It may import `rules` and `foundation`, numpy and torch; no plots and no data sets.
"""
