"""`python -m ktlsd` is `ktlsd`."""

from ktlsd.cli import main

main()
