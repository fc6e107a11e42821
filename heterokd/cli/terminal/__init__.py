"""Output of commands: lines, tables, the live view of a search and its summary."""
