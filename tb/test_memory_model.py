# SPDX-License-Identifier: Apache-2.0
"""The memory model: what it answers, when, in which order, and how it fails."""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict, deque

import cocotb
import pytest
from amaranth.hdl import Module, Signal
from amaranth.sim import Settle, Simulator
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, ReadOnly

from simulation import pack, run_bench, seeds, unpack
from stmoe.harness.memory_model import MemoryModel, address_of, content, word_at
from stmoe.payloads import axi4_read_signature
from stmoe_golden.config import preset

CONFIG = preset("tiny").replace(axi_data_width=128, max_outstanding=8)
DEPTH = 6
OKAY, SLVERR = 0, 2
