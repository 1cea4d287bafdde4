"""The findings of the paper, each run in a setting that fits a small machine: `make paper`, or

    python -m examples.paper [EXPERIMENT ...] [--folder runs/paper] [--address ray://HOST:10001] [--page docs/paper]

An experiment is a module with its settings, its runs, and the rule by which a finding counts as reproduced. Settings
and rules were fixed with the seeds `SEEN`; the seeds of the page, `SEEDS`, were run afterwards.
"""
