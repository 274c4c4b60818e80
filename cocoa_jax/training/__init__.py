"""From a config to a trained stage: mesh, shardings, optimizer, step and loop."""
