"""The engine: what users train with, how it is built, and what scripts ask of it."""
