"""``cocoa data``: its verbs."""

from __future__ import annotations

from cocoa_jax.commands import looking, preparing, synthesizing
from cocoa_jax.commands.command import Group

GROUP = Group(
    "Bring training data into form, look at it, check it, and measure how fast it comes.",
    {
        "bench": preparing.BENCH,
        "build": preparing.BUILD,
        "check": looking.CHECK,
        "inspect": looking.INSPECT,
        "synthesize": synthesizing.SYNTHESIZE,
    },
)
