"""Pictures and charts of a study, for its page; matplotlib is imported nowhere else.

`colours` says what colour a class has, `vector` makes SVG for the inside of a page. `progress`, `comparing` and
`parameters` draw a search, `matrices` and `drawing` what a student sees: all take plain values and know nothing of
studies. `studied` opens the study's networks and runs val.
"""
