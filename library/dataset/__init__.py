"""From a dataset config to the batches of a run."""
