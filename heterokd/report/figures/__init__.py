"""Figures and charts of a study; matplotlib is imported nowhere else.

`palette` assigns colours, `svg` makes charts for the page. `history`, `comparison` and `parameters` draw a search,
`matrices` and `samples` a student's predictions. All take plain values.
"""
