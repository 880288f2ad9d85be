"""What zeroxide knows of an optimizer rule. What the rule computes is in a file of the same name in Rust."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from zeroxide.config.facts import Resolved
from zeroxide.config.fields import Flag, NotBuilt

__all__ = ["AMSGRAD", "FP32_STATES", "DeepSpeedClass", "Rule"]

AMSGRAD = Annotated[Flag | None, NotBuilt("AMSGrad")]
FP32_STATES = Annotated[Flag | None, NotBuilt("optimizer states below fp32", neutral=(True,))]


@dataclass(frozen=True)
class DeepSpeedClass:
    """DeepSpeed's class for a rule: its arguments after the parameters, with their defaults.

    The argument `fp32_optimizer_states`, which all of them have last, is not among them.
    """

    name: str
    arguments: Mapping[str, Any]
    meaning: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The hyperparameter behind each argument that has another name."""


@dataclass(frozen=True)
class Rule(Resolved):
    """The base of the rules. The fields of a rule are its hyperparameters, as a parameter group has them.

    A field's default is that of the config. Its type is that of its key in `optimizer.params`. The core has each under
    the same name, but `betas` as `beta1` and `beta2`. The docstring says where the formula is from and what each
    hyperparameter does; the classes for plain loops have it, too.
    """

    key: ClassVar[str] = "optimizer"
    name: ClassVar[str]
    """What a parameter group calls the rule, in its key "optimizer"."""
    types: ClassVar[tuple[str, ...]]
    """What `optimizer.type` calls it, as in DeepSpeed."""
    keys: ClassVar[Mapping[str, Any]] = {}
    """The types of further keys of `optimizer.params`."""
    keyless: ClassVar[tuple[str, ...]] = ()
    """Hyperparameters that have no key."""
    torch: ClassVar[tuple[str, ...]] = ()
    """The classes in `torch.optim` whose objects are taken over."""
    own: ClassVar[tuple[str, ...]] = ()
    """Hyperparameters that are no arguments of torch's class, nor of that for plain loops."""
    unsaved: ClassVar[tuple[str, ...]] = ()
    """Other hyperparameters that a saved group need not have."""
    loop_defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of the class for plain loops that are not those of the config."""
    deepspeed: ClassVar[DeepSpeedClass | None] = None

    def written(self) -> dict[str, Any]:
        """See `Resolved.written`."""
        said = {name: getattr(self, name) for name in self.names() if name not in self.keyless}
        return {"optimizer.type": self.types[0], **{f"optimizer.params.{name}": value for name, value in said.items()}}

    @classmethod
    def people(cls) -> str:
        """What messages call the rule."""
        return " or ".join(cls.types)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Its hyperparameters."""
        return tuple(each.name for each in dataclasses.fields(cls))

    @classmethod
    def of_keys(cls, keys: dict[str, Any], kind: str, origin: str) -> dict[str, Any]:
        """The hyperparameters that the given keys of `optimizer.params` come to, for the `optimizer.type` `kind`.

        What is no hyperparameter is dropped. Raises ConfigError for keys that contradict one another; `origin` is what
        messages call the source of the document.
        """
        del kind, origin
        return keys

    def check(self, path: str) -> None:
        """Raises ConfigError for hyperparameters, set by keys at `path`, that do not go together."""

    @classmethod
    def of_torch(cls, kind: str, group: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters that a group of torch's class `kind` has under other names, or implies.

        Raises ConfigError for an option that changes what a step computes, and is not built.
        """
        del kind, group
        return {}

    @classmethod
    def saved_by_another(cls, mine: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
        """Why a saved group `other` cannot be taken over into the group `mine`; None where it can."""
        del mine, other
        return None

    @classmethod
    def entry(cls, saved: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """A parameter's state in a state dict, torch's too, with "step" in it; None where it says nothing yet."""
        return saved
