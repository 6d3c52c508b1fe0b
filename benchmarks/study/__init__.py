"""Does it keep models safe? Every method on the same tasks, seeds and requests.

`make study` runs what `results.csv` has no rows of yet and writes `report.html`; the plan is in
`methods.py`, the data in `data.py`, one run in `runs.py`.
"""
