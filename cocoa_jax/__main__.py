"""``python -m cocoa_jax``: the command line."""

from cocoa_jax.cli import main

main()
