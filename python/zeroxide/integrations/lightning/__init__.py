"""zeroxide as a strategy of Lightning: `import zeroxide.integrations.lightning`, then `strategy="zeroxide_stage_3"`.

The import registers the names of `settings.NAMES` with `lightning.pytorch` and with `lightning.fabric`; where a name
says too little, `ZeroxideStrategy(...)` or `ZeroxideFabricStrategy(...)` takes its place. Raises ImportError where
there is no Lightning.
"""

from importlib.util import find_spec

if find_spec("lightning") is None:
    raise ImportError(
        "zeroxide.integrations.lightning needs lightning, which is not installed: pip install lightning",
        name="lightning",
    )

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from zeroxide.integrations.lightning.fabric import ZeroxideFabricPrecision, ZeroxideFabricStrategy
from zeroxide.integrations.lightning.settings import NAMES
from zeroxide.integrations.lightning.trainer import ZeroxidePrecision, ZeroxideStrategy

__all__ = ["ZeroxideFabricPrecision", "ZeroxideFabricStrategy", "ZeroxidePrecision", "ZeroxideStrategy"]

for _name, _options in NAMES.items():
    _text = f"zeroxide at ZeRO stage {_options['stage']}, offload: {_options['offload']}"
    StrategyRegistry.register(_name, ZeroxideStrategy, description=_text, override=True, **_options)
    STRATEGY_REGISTRY.register(_name, ZeroxideFabricStrategy, description=_text, override=True, **_options)
