"""Runs that survive their process: commits of all state, and going on from the last one."""
