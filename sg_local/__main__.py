"""`python -m sg_local`, the same as `sg-local`."""

from sg_local.cli import main

main()
