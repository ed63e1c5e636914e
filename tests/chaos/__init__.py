"""Mixed tasks in great number while all around them is disturbed: `python -m tests.chaos [--minutes N] [--seed S]`.

`kinds` is everything that a task may be, submitted from several threads to three pools: a plain one, and two whose
workers come and go by themselves. `disorder` kills, stops and continues workers and what they have started at random
moments, and leaves the client few descriptors, or none, for a while (not with `--no-thief`, where a task that fails for
want of them is wrong, too). At the end each future has had one outcome, each result was right, no task ran twice and
none that was said not to have (each leaves a mark in a ledger, also those of a batch, the items of a map, and
programs), what they logged has come once, and descriptors and processes are what they were. The seed decides what is
submitted, and what is done to whom how soon; when the kernel does it is not in its power, so a failure comes again with
the same seed soon, and not at the same task.
"""
