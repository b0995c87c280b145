"""Fixtures that several files share."""

from toy_session import machine, runtime, toy

__all__ = ["machine", "runtime", "toy"]
