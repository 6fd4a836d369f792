from __future__ import annotations

from grok_local.runtime.graph.tap import ExpertStats as ExpertStats
