"""`python -m craton.cli` is `craton`."""

from craton.cli import main

main()
