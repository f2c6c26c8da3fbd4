# SPDX-License-Identifier: Apache-2.0
"""The engine itself: the golden predictor, gate, eviction and admission."""

from __future__ import annotations

from ..confidence import GateParams, gate_params
from ..config import FRACTION_BITS, EngineConfig
from .base import Policy

__all__ = ["Ours"]


class Ours(Policy):
    """Scores of :mod:`stmoe_golden.predictor` guess, evict and admit; all settings are the
    configuration's."""

    name = "ours"
    learned = True
    compares = True

    def __init__(self, config: EngineConfig):
        super().__init__(config)
        self.look = config.look
        self.bonus = config.admission_bonus << FRACTION_BITS

    def gate(self) -> GateParams:
        return gate_params(self.config)
