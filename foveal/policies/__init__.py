"""Which pattern in which layer."""

from .policy import ModelStamp, Policy, Rule

__all__ = ["ModelStamp", "Policy", "Rule"]
