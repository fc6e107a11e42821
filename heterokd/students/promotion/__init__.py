"""Promotion: evaluate the challenger on the test split, and make it champion if it passes every gate.

Challenger, champion and the study's scratch baseline are evaluated on the same test images by the same code. In
classification the exact McNemar test [1] gives the probability that the images on which two students disagree split
this unevenly by chance; in segmentation a paired bootstrap over the images [2] tests the gain in mIoU. A file lock
serialises the promotions of a workspace; a second promotion of the same student changes nothing.

`promote` decides; `challenger` finds the student, `opponent` its opponent, `gates` checks the limits, `record` stores
the `decision` with its `model_card`, `rollback` undoes it; `aliases` is shared.

[1] Quinn McNemar: Note on the sampling error of the difference between correlated proportions or percentages.
    Psychometrika 12, 1947. Exact form: a binomial test on the images on which the students disagree.
[2] Bradley Efron, Robert Tibshirani: An Introduction to the Bootstrap. Chapman & Hall 1993, chapter 13 (percentile
    intervals). Both students are resampled with the same images, so that the difficulty of an image cancels.
"""
