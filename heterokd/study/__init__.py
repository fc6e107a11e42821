"""The Optuna study and every decision of a search: what runs next, what is stopped, what is repeated. Knows no Ray.

    study = Study.open(experiment, folder)
    while (assignment := study.next()) is not None:       "wait": call again when a trial has finished
        study.report(number, epoch, metrics, curve)       at the epochs of assignment.rungs; False: stop the trial
        study.finish(number, status, metrics)

Order of a search: each method's published settings (scratch first, then by the rank that published tables predict),
samples of a group-aware multivariate TPE, then repetitions of the leaders on fresh seeds. Each decision depends on the
database alone, so a resumed search makes the same decisions as an uninterrupted search (with several parallel trials,
also on the order in which they finish).

`study` decides what comes next, `proposer` and `sampler` propose samples, `pruner` stops trials, `posterior` and
`leaderboard` rank noisy values, `confirmation` repeats leaders, `budget` and `ledger` count costs; `storage` opens the
database, `question` compares an experiment with it, `trials` reads and writes it; `assignment`, `progress`, `summary`
and `search_result` are what callers get. `plan` estimates a search by simulating it.
"""
