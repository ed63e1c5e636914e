"""Mixed tasks in great number while all around them is disturbed: `python -m tests.chaos [--minutes N] [--seed S]`.

`kinds` is everything that a task may be, submitted from several threads; `disorder` kills, stops and continues workers
and what they have started at random moments, and leaves the client no descriptors for a while. At the end each future
has had one outcome, each result was right, no task ran twice (each leaves a mark in a ledger), and descriptors and
processes are what they were. The seed decides what is submitted, and what is done to whom how soon; when the kernel
does it is not in its power, so a failure comes again with the same seed soon, and not at the same task.
"""
