"""`python -m gradsift` is the command line."""

from gradsift.bindings.cli import main

main()
