"""The Optuna study and every decision of a search: what runs next, who goes on at a rung, who is trained again.

    study = Study(experiment, folder)
    while (assignment := study.next()) is not None:       "wait": ask again once something has finished
        study.report(number, epoch, metrics, curve)       at each of assignment.rungs; False: stop, then finish "pruned"
        study.finish(number, state, metrics)

Order of a search: each method's published settings (scratch first, then by the rank that published tables let expect),
then samples of a group-aware multivariate TPE, then the leaders again on fresh seeds. Opening a study that was
interrupted goes on with it: each decision follows from the database alone, so the same trials come as without the
interruption (one at a time; with several, the order in which they finish decides as well).

`study` decides what comes next, `sampling` proposes, `halving` stops, `leaders` compares by what `beliefs` says of
noisy values, `confirming` repeats, `spending` counts; `storage` opens the database, `trials` reads and writes it;
`assignments`, `standing` and `summary` are what callers get, and `importance` what the values of a finished study tell.
"""
