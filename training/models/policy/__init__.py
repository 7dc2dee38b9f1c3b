"""Behavioural-cloning policies for Super Smash Bros. Melee over short windows of frames."""

from training.models.policy.spec import SPECS

__all__ = ["SPECS"]
