"""`import deepspeed` finds zeroxide, in this process, from this import on.

A script makes it its first line, before accelerate or transformers are imported, which look for DeepSpeed once;
`zeroxide run` and the environment variable `ZEROXIDE_AS_DEEPSPEED=1` do the same without a change, in processes that a
script starts, too. Installing zeroxide alone changes nothing. A DeepSpeed that is installed is left alone, and is not
found while this is active.
"""

from zeroxide.integrations.deepspeed.finder import activate

__all__ = ["activate"]

activate()
