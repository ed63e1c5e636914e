"""fdpool, its peers and the bare kernel, measured in turn: `python -m tests.benchmarks`.

    __main__      options
    measures/     what is measured, one family a file; `measures.every()` has them all
    _measure      the words of that: Measure, Goal, Outcome, Settings
    peers         one set of verbs for every pool
    work          what the tasks do
    _contestant   one peer in one measure, in a process of its own that runs a round when told to
    _driver       tells the contestants of a measure in turn, in another order each round
    _cpu          what a tree of processes has used
    _results      rounds -> medians, ratios, verdicts
    _report       tables for the terminal and for docs/benchmarks.md
    _plot         the picture

The measure's client is the contestant, so no peer's threads, memory or garbage disturb another's figures.
"""
