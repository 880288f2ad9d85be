"""The optimizer rules, one file each: all that zeroxide knows in Python of a rule, as `Rule` describes it."""

from zeroxide.config.rules.adagrad import Adagrad
from zeroxide.config.rules.adam import Optimizer
from zeroxide.config.rules.lion import Lion
from zeroxide.config.rules.rule import DeepSpeedClass, Rule
from zeroxide.config.rules.sgd import SGD

__all__ = ["RULES", "SGD", "Adagrad", "DeepSpeedClass", "Lion", "Optimizer", "Rule"]

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Optimizer, Lion, Adagrad, SGD)}
"""By what a parameter group calls each."""
