"""What trains structured layers: parameter groups for optimizers, windows learned under a budget."""

from structmat.learn.choices import choice_penalty, harden_choices
from structmat.learn.groups import learning_rate_multipliers, parameter_groups, recovery_groups
from structmat.learn.windows import WindowLearner

__all__ = [
    "WindowLearner",
    "choice_penalty",
    "harden_choices",
    "learning_rate_multipliers",
    "parameter_groups",
    "recovery_groups",
]
