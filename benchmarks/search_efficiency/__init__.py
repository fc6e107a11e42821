"""How much compute a search needs to find a truly good student, on tables of trainings that were all run beforehand.

    python -m benchmarks.search_efficiency build      trains every configuration of three pairs (minutes; kept in git)
    python -m benchmarks.search_efficiency run        lets eight strategies search the tables; JSON, table and picture

Truth is the mean over seeds that no search sees; regret is (best - chosen) / (best - median) of it.

`digits` and `networks` say what is trained, `pairs` which three questions are asked and which configurations there are,
`students` trains many at a time, `table` keeps the results, `clock` replays them to k workers, `strategies` search,
`figures` sums up.
"""
