"""`python -m heterokd` is the command line."""

from heterokd.cli.app import main

main()
