"""What commands show: a live view on a terminal, one line per finished trial in a pipe, and tables.

`speaking` prints lines, `searching` watches a search, `closing` sums it up, `tables` lays out what they print.
"""
