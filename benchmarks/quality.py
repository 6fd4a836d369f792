"""What 4 bits cost a trained model: the built-in one, packed to several types, on wordings it was not trained on.

    uv run python -m benchmarks.quality [--write]

The corpus holds one wording of every fact out of training. Each becomes a conversation of one turn; perplexity is
over its tokens after the introduction, KL divergence is from the release's own int8 (q8_0, nothing lost), the share of
right answers is over the 100 questions of tests/questions.jsonl, greedily decoded. `--write` puts the tables into
docs/tiny.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import grok_local
from grok_local.models import tiny
from grok_local.quantize.sources.checkpoint import open_checkpoint
from tests.reference_model import ReferenceModel
from training.documents import ANSWER, EOS, SYSTEM, Pieces, conversation
from training.facts import is_right, read_facts

__all__ = ["Scores", "document_ids", "held_out_documents", "right_answers", "routes", "scores"]

ROOT = Path(__file__).parents[1]
QUESTIONS = ROOT / "tests" / "questions.jsonl"
TYPES = ("q8_0", "q4_k", "iq4_xs", "mxfp4", "q4_0")
_BASE = "q8_0"

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of every position's distribution, and of the tokens that came, per document."""

    distributions: list[npt.NDArray[np.float32]]  # [scored tokens, vocabulary]
    came: list[npt.NDArray[np.intp]]
    answers: list[npt.NDArray[np.bool_]]

    def perplexity(self, *, only_answers: bool = False) -> float:
        losses = [
            -rows[np.arange(len(came)), came][answers if only_answers else slice(None)]
            for rows, came, answers in zip(self.distributions, self.came, self.answers, strict=True)
        ]
        return float(np.exp(np.concatenate(losses).mean()))

    def divergence_from(self, base: Scores) -> float:
        """KL(base || self) in nats, mean per token."""
        pairs = zip(base.distributions, self.distributions, strict=True)
        return float(np.concatenate([(np.exp(p) * (p - q)).sum(-1) for p, q in pairs]).mean())


def held_out_documents(step: int = 1) -> list[Pieces]:
    """Every `step`-th fact, asked as it was not in training."""
    return [conversation([(wording, fact.answer)]) for fact in read_facts()[::step] for wording in fact.held_out]


def document_ids(model: grok_local.Model, pieces: Pieces) -> tuple[list[int], int, int]:
    """Ids with EOS, how many are of the introduction, and how many come before the answer."""
    texts = ["".join(text for text, _ in pieces[:count]) for count in (1, len(pieces) - 1, len(pieces))]
    introduction, question, whole = (model.tokenize(text) for text in texts)
    return [*whole, EOS], len(introduction), len(question)


def scores(model: grok_local.Model, documents: list[Pieces]) -> Scores:
    """Evaluate every document."""
    result = Scores([], [], [])
    for pieces in documents:
        assert [pieces[0][1], pieces[-1][1]] == [SYSTEM, ANSWER]
        ids, start, answer = document_ids(model, pieces)
        logits = model.logits(ids[:-1])[start - 1 :]
        logits -= logits.max(-1, keepdims=True)
        result.distributions.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        result.came.append(np.array(ids[start:]))
        result.answers.append(np.arange(start, len(ids)) >= answer)
    return result


def right_answers(model: grok_local.Model, *, chat: bool = True) -> list[tuple[bool, str, str]]:
    """Whether it was right, the question, and the answer, for each of the questions."""
    results = []
    for line in QUESTIONS.read_text("utf-8").splitlines():
        asked = json.loads(line)
        message = {"role": "user", "content": asked["question"]}
        if chat:
            reply: grok_local.Reply = model.chat([message], temperature=0, max_tokens=80)
        else:
            reply = model.generate(asked["question"], temperature=0, max_tokens=80)
        text = "".join(reply).strip()
        results.append((is_right(text, asked["keywords"]), asked["question"], text))
    return results


def routes(model: grok_local.Model, documents: list[Pieces]) -> Floats:
    """Share of the tokens' routes that each expert gets, [layers, experts]; every row adds up to 1."""
    dims = open_checkpoint(tiny.CHECKPOINT).dimensions
    reference = ReferenceModel(tiny.CHECKPOINT, dims)
    counts = np.zeros((dims.layers, dims.experts))
    for pieces in documents:
        _, chosen = reference.forward(document_ids(model, pieces)[0])
        for layer in range(dims.layers):
            counts[layer] += np.bincount(chosen[layer].ravel(), minlength=dims.experts)
    shares: Floats = counts / counts.sum(-1, keepdims=True)
    return shares


def _table(folder: Path) -> Iterator[str]:
    documents = held_out_documents()
    base = None
    columns = ("type", "GGUF", "perplexity", "x q8_0", "of answers alone", "x q8_0", "KL divergence")
    yield " | ".join(("", *columns, "right of 100 in chat", "in generate", "")).strip()
    yield "|---" * (len(columns) + 2) + "|"
    for name in TYPES:
        report = grok_local.quantize_checkpoint(tiny.CHECKPOINT, folder / f"{name}.gguf", type=name)
        with grok_local.load(report.path, context=512, kv_type="f32") as model:
            measured = scores(model, documents)
            base = base or measured
            whole, answers = measured.perplexity(), measured.perplexity(only_answers=True)
            right = [sum(ok for ok, _, _ in right_answers(model, chat=chat)) for chat in (True, False)]
        yield (
            f"| {name} | {report.bytes / 1e6:.2f} MB | {whole:.3f} | {whole / base.perplexity():.3f} | {answers:.3f} | "
            f"{answers / base.perplexity(only_answers=True):.3f} | {measured.divergence_from(base):.4f} | "
            f"{right[0]} | {right[1]} |"
        )


def _routes_table(folder: Path) -> Iterator[str]:
    with grok_local.load(folder / f"{_BASE}.gguf", context=512) as model:
        shares = routes(model, held_out_documents())
    yield "| layer | " + " | ".join(f"expert {n}" for n in range(shares.shape[1])) + " |"
    yield "|---" * (shares.shape[1] + 1) + "|"
    for layer, row in enumerate(shares):
        yield f"| {layer} | " + " | ".join(f"{100 * share:.1f} %" for share in row) + " |"


def _placed(page: str, name: str, table: str) -> str:
    """The page with `table` between the marks of that name."""
    before, mark, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    assert mark and end, f"docs/tiny.md has no place for {name}"  # noqa: PT018
    return f"{before}{mark}{table}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/tiny.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tables = {name: "\n".join(make(Path(folder))) for name, make in (("types", _table), ("routes", _routes_table))}
    page = ROOT / "docs" / "tiny.md"
    text = page.read_text("utf-8")
    for name, table in tables.items():
        print(table, end="\n\n")
        text = _placed(text, name, table)
    if args.write:
        page.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
