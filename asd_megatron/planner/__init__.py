"""What a recipe needs on given hardware, worked out without any: memory of every rank, seconds of every phase, layouts
that fit. Pure functions of a `Setting`; `run/planning.py` makes one from a recipe.

`setting` and `hardware` are the inputs. `parameters`, `activations`, `head`, `states`, `serving`, `memory` count bytes;
`lengths`, `loads`, `compute`, `communication`, `training`, `rollout`, `transfers` and `step_time` seconds; `layouts`,
`proposals` and `reasons` search layouts, `scale` over the number of GPUs; `calibration` measures this machine's rates.
"""
