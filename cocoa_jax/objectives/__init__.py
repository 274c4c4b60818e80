"""The three stages' losses as pure functions of a model and a batch."""
