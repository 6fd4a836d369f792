"""What 4 bits cost a trained model: the built-in one, packed to several types, on wordings it was not trained on.

    python -m benchmarks.quality [--write]

The corpus holds one wording of every fact out of training. Each becomes a conversation of one turn; perplexity is
over its tokens after the introduction, KL divergence is from the release's own int8 (q8_0, nothing lost), the share of
right answers is over the 100 questions of tests/questions.jsonl, greedily decoded. `--write` puts the tables into
docs/tiny.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grok_local
from grok_local.library.built_in import CHECKPOINT
from samples.quality import TYPES, counted, held_out_documents, judged, right_answers, routes, scores

ROOT = Path(__file__).parents[1]
_BASE = "q8_0"
_KINDS = (
    (True, False, "answered in the documents"),
    (True, True, "about what came with 0.2.0"),
    (False, None, "not answered there"),
)


def _table(folder: Path) -> Iterator[str]:
    documents = held_out_documents()
    base = None
    columns = ("type", "GGUF", "perplexity", "x q8_0", "of answers alone", "x q8_0", "KL divergence")
    yield " | ".join(("", *columns, "right of 100 in chat", "in generate", "")).strip()
    yield "|---" * (len(columns) + 2) + "|"
    for name in TYPES:
        report = grok_local.quantize_checkpoint(CHECKPOINT, folder / f"{name}.gguf", type=name)
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


def _answers_table(folder: Path) -> Iterator[str]:
    yield "| | right | honest | wrong |"
    yield "|---" * 4 + "|"
    with grok_local.load(folder / "q4_k.gguf", context=512) as model:
        for chat in (True, False):
            results = judged(model, chat=chat)
            for answerable, is_new, what in _KINDS:
                found = counted(results, answerable=answerable, is_new=is_new)
                name = f"{'chat' if chat else 'generate'}: {found.total()} questions {what}"
                yield f"| {name} | {found['right']} | {found['honest']} | {found['wrong']} |"


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
        makers = {"types": _table, "answers": _answers_table, "routes": _routes_table}
        tables = {name: "\n".join(make(Path(folder))) for name, make in makers.items()}
    page = ROOT / "docs" / "tiny.md"
    text = page.read_text("utf-8")
    for name, table in tables.items():
        print(table, end="\n\n")
        text = _placed(text, name, table)
    if args.write:
        page.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
