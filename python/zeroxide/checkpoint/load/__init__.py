"""From the files of a checkpoint to a training state, verified before anything changes."""
