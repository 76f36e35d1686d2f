"""What trains structured layers: parameter groups for optimizers."""

from structmat.learn.groups import learning_rate_multipliers, parameter_groups, recovery_groups

__all__ = ["learning_rate_multipliers", "parameter_groups", "recovery_groups"]
