"""What gives a plain loop's optimizer the arguments and the documentation that its rule's description has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import Parameter, Signature, cleandoc
from typing import Any

import torch

from zeroxide.config import RULES, Rule
from zeroxide.errors import ConfigError
from zeroxide.optim.core_optimizer import CoreOptimizer
from zeroxide.optim.groups import STEPPED, refuse_options
from zeroxide.optim.rules import hyperparameters

__all__ = ["DeepSpeedLoop", "Loop"]

_PLACEMENT = [
    each for each in Signature.from_callable(CoreOptimizer).parameters.values() if each.kind is Parameter.KEYWORD_ONLY
]


class Loop(CoreOptimizer):
    """A class below this one is that of the rule `of`."""

    def __init_subclass__(cls, *, of: str | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        if of is not None:
            cls._follow(RULES[of])

    @classmethod
    def _follow(cls, rule: type[Rule]) -> None:
        """Gives the class the constructor and the documentation of `rule`."""
        defaults = {**hyperparameters(rule), **rule.loop_defaults}
        shown = {name: default for name, default in defaults.items() if name not in rule.own}
        raised = "The other arguments and what is raised: see `CoreOptimizer`."
        cls._construct(rule, raised, "params", shown, _PLACEMENT, lambda given: {**defaults, **given})

    @classmethod
    def _construct(
        cls,
        rule: type[Rule],
        raised: str,
        params: str,
        arguments: dict[str, Any],
        placement: list[Parameter],
        complete: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        """Makes the constructor, which takes `params`, `arguments` with their defaults, then `placement`.

        complete: the group's hyperparameters, from the values of `arguments`. raised: the end of the documentation.
        """
        either = Parameter.POSITIONAL_OR_KEYWORD
        own = [Parameter(name, either, default=each, annotation=_type(each)) for name, each in arguments.items()]
        first = [Parameter("self", either), Parameter(params, either, annotation=Iterable[Any])]
        signature = Signature([*first, *own, *placement], return_annotation=None)

        def __init__(self: CoreOptimizer, *positional: Any, **named: Any) -> None:
            try:
                bound = signature.bind(self, *positional, **named)
            except TypeError as error:
                raise TypeError(f"{cls.__qualname__}.__init__() {error}") from None
            bound.apply_defaults()
            given = {name: bound.arguments[name] for name in arguments}
            options = {each.name: bound.arguments[each.name] for each in placement}
            CoreOptimizer.__init__(self, bound.arguments[params], complete(given), **options)

        __init__.__signature__ = signature  # type: ignore[attr-defined]
        __init__.__qualname__ = f"{cls.__qualname__}.__init__"
        cls.rule = rule.name
        cls.__doc__ = "\n\n".join((cls.__doc__ or "", cleandoc(rule.__doc__ or ""), raised))
        cls.__init__ = __init__  # type: ignore[method-assign]

    # What type checkers see of every class's constructor.
    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)


class DeepSpeedLoop(Loop):
    """A class below this one is DeepSpeed's of the rule `of`."""

    places_late = True

    def hand_over(self) -> list[dict[str, Any]]:
        """See `HandsOver`: a schedule made over the groups goes on driving them."""
        if self.state:
            raise ConfigError(STEPPED, path="optimizer")
        for group in self.param_groups:
            refuse_options(group)
        self.close()
        self._opt_called = True  # its schedules need not warn: the engine steps
        return list(self.param_groups)

    @classmethod
    def _follow(cls, rule: type[Rule]) -> None:
        theirs = rule.deepspeed
        assert theirs is not None, rule.name
        unbuilt = "`amsgrad` and state below fp32" if "amsgrad" in theirs.arguments else "state below fp32"
        raised = f"Raises ConfigError for {unbuilt}: not built; else as `CoreOptimizer`."

        def complete(given: dict[str, Any]) -> dict[str, Any]:
            refuse_options(given)
            known = {theirs.meaning.get(name, name): value for name, value in given.items()}
            defaults = hyperparameters(rule)
            return {name: known.get(name, default) for name, default in defaults.items()}

        arguments = {**theirs.arguments, "fp32_optimizer_states": True}
        cls._construct(rule, raised, "model_params", arguments, [], complete)


def _type(default: Any) -> Any:
    """The type of an argument: any number may be a tensor, which is read at every step."""
    if isinstance(default, bool):
        return bool
    number = float | torch.Tensor
    return tuple[number, number] if isinstance(default, tuple) else number
