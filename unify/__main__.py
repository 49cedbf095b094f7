"""`python -m unify` is `unify`: what a launcher of several processes can name."""

from .cli import main

main()
