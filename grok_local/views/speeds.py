"""What an answer took, in a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grok_local.units import format_bytes

if TYPE_CHECKING:
    from grok_local.runtime.experts.waiting import ExpertStats
    from grok_local.runtime.text.reply import Reply, Stats

__all__ = ["experts_line", "stats_line"]


def experts_line(experts: ExpertStats, tokens: int) -> str:
    """What streaming took, in words."""
    return (
        f"{format_bytes(experts.bytes_read)} of experts read, {format_bytes(round(experts.bytes_read / tokens))} a "
        f"token; {experts.hit_rate:.0%} were in memory; {experts.wait_seconds:.1f} s waiting for the disk, "
        f"{experts.compute_seconds:.1f} s computing"
    )


def stats_line(reply: Reply) -> str:
    """Tokens and speed of one answer."""
    stats = reply.stats
    reason = {
        "stop": "",
        "length": ", cut at --max-tokens",
        "context": ", context full",
        "interrupted": ", interrupted",
    }
    return (
        f"[{stats.generated_tokens} tokens, {stats.generation_speed:.2f} tok/s; prompt {stats.evaluated_tokens} new"
        f" + {stats.cached_tokens} cached, {stats.prompt_seconds:.2f} s{_streamed(stats)}"
        f"{reason[reply.finish_reason or 'interrupted']}]"
    )


def _streamed(stats: Stats) -> str:
    experts, tokens = stats.generation_experts, stats.generated_tokens
    if not (experts and tokens):
        return ""
    return f"; {format_bytes(round(experts.bytes_read / tokens))} read a token, {experts.hit_rate:.0%} hits"
