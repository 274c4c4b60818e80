"""One module per group of sub-commands of ``cocoa``: what each takes, and which function does it."""
