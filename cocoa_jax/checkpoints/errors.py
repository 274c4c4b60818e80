"""The errors that everything about checkpoints raises."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written as asked; the message lists every problem that was found."""


class MissingCheckpointError(CheckpointError):
    """There is no checkpoint: no folder, or one that holds none."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint cannot be read back as it was saved: files are missing, cut short or changed."""


class UnavailableCheckpointError(CheckpointError):
    """A checkpoint cannot be read or written now for a reason that passes by itself, such as a network: try again."""
