"""Pictures, pairs, prompts and batches: everything from a record on disk to the arrays of a step."""
