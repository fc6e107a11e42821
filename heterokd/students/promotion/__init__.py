"""promote(): the hold-out is opened, and the challenger becomes champion, or not.

Challenger, champion and the study's scratch baseline are evaluated on the same test images by the same code. In
classification the exact McNemar test [1] says how likely the images on which two students disagree would fall out this
unevenly by chance; in segmentation a paired bootstrap over the images [2] says how surely the gain in mIoU is one.
A file lock serialises promotions of one root; promoting twice is the same as once.

`promoting` decides, `decision` says what came of it, `figures` measures, `card` describes the student, `rollback` takes
the last promotion back, `record` is what those share.

[1] Quinn McNemar: Note on the sampling error of the difference between correlated proportions or percentages.
    Psychometrika 12, 1947. Exact form: a binomial test on the images that one student gets right and the other wrong.
[2] Bradley Efron, Robert Tibshirani: An Introduction to the Bootstrap. Chapman & Hall 1993, chapter 13 (percentile
    intervals). Both students are resampled alike, so that what makes an image hard for both cancels.
"""
