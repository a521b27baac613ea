"""What a recipe needs on given hardware, worked out without any: memory of every rank, seconds of every phase, layouts
that fit. Pure functions of a `Setting`; `run/planning.py` makes one from a recipe.

`setting` and `hardware` are the inputs. `parameters`, `activations` and `memory` count bytes, `compute`,
`communication`, `rollout` and `step_time` seconds, `proposals` searches layouts.
"""
