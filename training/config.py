"""The types of settings and of metrics."""

from typing import Any

Config = dict[str, Any]
Metrics = dict[str, float]
