"""From a training state to the files of a checkpoint, at once or beside training."""
