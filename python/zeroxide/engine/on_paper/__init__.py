"""What each rank of a job of any size would hold, compute and send, from shapes alone: no process group, no weights."""
