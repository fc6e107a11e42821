"""report.html: one offline page per study that says which student won, by how much, how sure that is, and what it cost.

`reading` reads a study's files, `words` and `answers` say what they mean, `tables` and the charts of `charts`, `values`
and `students` show it, `page` puts it together.

Charts are SVG inside the page: a plotting library that draws in the browser would add four megabytes to each page and
run a program where the reader only looks; what a mark is, its tip says without one. The page asks for nothing of any
network, and its own policy (Content-Security-Policy) has the browser refuse that.
"""
