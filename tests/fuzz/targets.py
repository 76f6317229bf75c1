"""Every reader of foreign bytes, by name."""

from __future__ import annotations

from . import chat_targets, model_targets
from .target import Target

TARGETS: dict[str, Target] = {target.name: target for target in (*model_targets.TARGETS, *chat_targets.TARGETS)}
