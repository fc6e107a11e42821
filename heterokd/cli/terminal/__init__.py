"""What commands show: a live view on a terminal, one line per finished trial in a pipe, and tables.

`console` prints lines, `live_search` shows a running search, `search_summary` its results, `tables` lays tables out.
"""
