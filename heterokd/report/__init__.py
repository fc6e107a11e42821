"""report.html: an offline page per study with the winner, its gain and interval, and the cost of the search.

`study_data` reads a study's files, `wording` and `cards` put results into words, `tables`, `search_charts`,
`parameter_charts` and `student_charts` show them, `page` writes the page. `measure` measures the winner on val before.

Charts are SVG inside the page, with tooltips: a plotting library in the browser would add four megabytes to each page.
The page loads nothing from the network, and its Content-Security-Policy makes the browser refuse to.
"""
