"""Trains the built-in model and writes its checkpoint and its loss curve: `python -m training`.

Stopped, the same command goes on from the last state saved.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from dataclasses import fields
from pathlib import Path

import sentencepiece

from training.curve import draw
from training.documents import Documents
from training.export import export
from training.facts import read_facts, read_follow_ups, read_prose
from training.judge import judged_questions
from training.previous import restored_parameters
from training.train import DIMENSIONS, Settings, train
from training.vocabulary import train_tokenizer

_ROOT = Path(__file__).parents[1]
_PACKAGE = _ROOT / "grok_local" / "models" / "tiny"
_LOG = _ROOT / "training" / "loss.csv"
_CURVE = _ROOT / "docs" / "training.svg"
_JUDGED = 300_000  # questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/tiny"), help="states and losses of the runs")
    parser.add_argument(
        "--start",
        type=Path,
        help="a checkpoint to go on from, with its vocabulary: then a few thousand steps at 1.5e-3 are enough",
    )
    parser.add_argument("--to", type=Path, default=_PACKAGE, help="where the checkpoint goes")
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = parser.parse_args()
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})

    facts, prose = read_facts(), read_prose()
    follow_ups = read_follow_ups()
    if args.start:
        tokenizer = (args.start / "tokenizer.model").read_bytes()
    else:
        tokenizer = train_tokenizer(facts, prose, vocabulary=DIMENSIONS.vocabulary)
    folder = args.folder / _key(facts, follow_ups, prose, settings, DIMENSIONS)
    folder.mkdir(parents=True, exist_ok=True)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    judged = judged_questions(facts, folder / "judged.tsv", count=_JUDGED, seed=settings.seed)
    documents = Documents(facts, prose, processor, follow_ups=follow_ups, judged=judged, seed=settings.seed)
    start = restored_parameters(args.start, DIMENSIONS) if args.start else None
    params = train(documents, folder, settings, start=start)
    export(params, DIMENSIONS, args.to)
    (args.to / "tokenizer.model").write_bytes(tokenizer)
    if args.to == _PACKAGE:
        shutil.copyfile(folder / "loss.csv", _LOG)
        draw(_LOG, _CURVE)


def _key(*inputs: object) -> str:
    """Tells runs apart: of another corpus or other settings, none goes on from another's state."""
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:8]


if __name__ == "__main__":
    main()
