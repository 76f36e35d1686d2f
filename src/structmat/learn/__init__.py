"""What trains structured layers: parameter groups for optimizers, SOAP, windows learned under a budget."""

from structmat.learn.choices import choice_penalty, harden_choices
from structmat.learn.groups import learning_rate_multipliers, parameter_groups, recovery_groups
from structmat.learn.layouts import Layout, layouts
from structmat.learn.soap import SOAP
from structmat.learn.windows import WindowLearner

__all__ = [
    "SOAP",
    "Layout",
    "WindowLearner",
    "choice_penalty",
    "harden_choices",
    "layouts",
    "learning_rate_multipliers",
    "parameter_groups",
    "recovery_groups",
]
