"""The name `deepspeed` is zeroxide's here, from before anything looks for it."""

from __future__ import annotations

import zeroxide.integrations.deepspeed  # noqa: F401
