"""What commands show: a live view on a terminal, one line per finished trial in a pipe, tables, numbers in words.

`speaking` says lines, `searching` watches a search, `closing` sums it up; `tables` and `words` are what they say.
"""

from heterokd.terminal.closing import closing
from heterokd.terminal.searching import SearchTerminal
from heterokd.terminal.speaking import Terminal
from heterokd.terminal.tables import leader_table, match_table, plan_lines, reproduction_table
from heterokd.terminal.words import SIZES, clock, score_text, size

__all__ = [
    "SIZES",
    "SearchTerminal",
    "Terminal",
    "clock",
    "closing",
    "leader_table",
    "match_table",
    "plan_lines",
    "reproduction_table",
    "score_text",
    "size",
]
