"""Where training's numbers are written to while it runs; it knows no engine."""

from zeroxide.monitor.monitor import Event, Monitor, open_writers

__all__ = ["Event", "Monitor", "open_writers"]
