"""The harness behind `dpo-kernels bench`: figures beside the limit of the machine, checked before they are shown.

`cases.py` makes inputs and right answers, `contenders.py` holds the limits and ours, `peers.py` the others,
`measure.py` takes time and memory, `report.py` makes tables of them and `charts.py` pictures; `command.py` is the
command.
"""
