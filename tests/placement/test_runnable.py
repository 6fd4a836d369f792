"""Files that are no text model, or none that llama.cpp runs: the same line from every command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import grok_local
from grok_local.errors import GGUFError, ModelError, OptionError
from grok_local.formats.gguf_file import read_model
from grok_local.ggml.architectures import is_known
from grok_local.placement.runnable import remarks, why_not
from samples.rewritten import rewritten
from tests.conftest import Run


def odd_file(path: Path, architecture: str, keys: dict[str, Any], tensor: str = "blk.0.attn_q.weight") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor(tensor, np.ones((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "keys", "words"),
    [
        ("clip", {"general.type": "mmproj"}, "projector"),
        ("clip", {"clip.has_vision_encoder": True}, "projector"),
        ("llama", {"general.type": "adapter", "adapter.type": "lora"}, "adapter"),
        ("llama", {"general.type": "imatrix"}, "importance matrix"),
        ("t5", {"t5.block_count": 1}, "encoder-decoder"),
        ("bert", {"bert.attention.causal": False}, "an encoder"),
        ("modern-bert", {}, "an encoder"),
        ("qwen3", {"qwen3.attention.causal": False}, "an encoder"),
        ("dream", {}, "diffusion"),
        ("flux", {}, "makes pictures"),
        ("grok-9", {}, "'grok-9' is unknown to the llama.cpp that is installed here"),
    ],
)
def test_what_a_file_is(tmp_path: Path, architecture: str, keys: dict[str, Any], words: str) -> None:
    assert words in (why_not(read_model(odd_file(tmp_path / "x.gguf", architecture, keys))) or "")


def test_what_llama_cpp_knows_is_asked_of_llama_cpp(packed: Path) -> None:
    assert [is_known(name) for name in ("grok", "llama", "mamba", "grok-9", "")] == [True, True, True, False, False]
    assert why_not(read_model(packed)) is None
    assert remarks(read_model(packed)) == []


def one_by_one(name: str, data: Any, kind: Any) -> list[tuple[str, Any, Any]]:
    if "_exps" not in name:
        return [(name, data, kind)]
    return [(name.replace("_exps.weight", f".{number}.weight"), expert, kind) for number, expert in enumerate(data)]


def test_every_command_says_the_same(run: Run, packed: Path, tmp_path: Path, home: Path) -> None:
    (home / "models").mkdir(parents=True)
    old = rewritten(packed, home / "models" / "old.gguf", without=("grok_local.",), tensors=one_by_one)
    for arguments in (["generate", "-m", old, "x"], ["plan", "-m", old, "--ram-speed", "50G"], ["inspect", old]):
        assert "experts are stored one by one, an old layout" in run(*arguments).stderr
    assert "experts are stored one by one" in run("list").stdout


def test_a_model_that_only_encodes_never_aborts_the_process(packed: Path, tmp_path: Path) -> None:
    keys = {"grok.attention.causal": False}
    with grok_local.load(rewritten(packed, tmp_path / "x.gguf", keys=keys), context=64) as model:
        for use in (lambda: model.logits([1, 2]), lambda: list(model.generate("x", max_tokens=1))):
            with pytest.raises(ModelError, match="an encoder"):
                use()


def test_a_file_without_a_tokenizer_takes_token_ids(run: Run, packed: Path, tmp_path: Path) -> None:
    count = len(gguf.GGUFReader(packed).fields["tokenizer.ggml.tokens"].contents())
    keys = {"tokenizer.ggml.model": "no_vocab", "grok.vocab_size": count}
    path = rewritten(packed, tmp_path / "x.gguf", keys=keys, without=("tokenizer.",))
    with grok_local.load(path, context=64) as model:
        assert model.logits([1, 2]).shape == (2, count)
        assert model.detokenize([1, 2]) == ""
        assert [result.text for result in model.batch([{"prompt": [1, 2], "max_tokens": 2}])] == [""]
        for use in (lambda: model.tokenize("x"), lambda: list(model.generate("x", max_tokens=1))):
            with pytest.raises(OptionError, match="has no tokenizer: its prompts can be token ids only"):
                use()
    ended = run("generate", "-m", path, "x", "--context", 64)
    assert (ended.returncode, ended.stderr.count("has no tokenizer")) == (2, 1)


def test_llama_cpps_misgivings_become_notes(packed: Path, tmp_path: Path) -> None:
    tokens = gguf.GGUFReader(packed).fields["tokenizer.ggml.tokens"].contents()
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a b"]}
    path = rewritten(packed, tmp_path / "x.gguf", keys=keys, without=("tokenizer.ggml.pre",))
    assert "tokenizer.ggml.pre is missing" in remarks(read_model(path))[0]
    with grok_local.load(path, context=64) as model:
        assert any("tokenizer.ggml.pre is missing" in note for note in model.placement.notes)


def test_layers_for_further_tokens_cost_nothing(packed: Path, tmp_path: Path) -> None:
    from grok_local.placement.shape import ModelShape

    whole = ModelShape.from_headers(read_model(packed))
    shorter = rewritten(packed, tmp_path / "x.gguf", keys={"grok.nextn_predict_layers": 1})
    shape = ModelShape.from_headers(read_model(shorter))
    assert (whole.layers, shape.layers) == (2, 1)
    assert {weight.layer for weight in shape.weights} == {None, 0}
    assert len(shape.kv_widths) == 1


def test_a_context_beyond_the_trained_one_is_noted(packed: Path) -> None:
    with grok_local.load(packed, context=8448) as model:
        assert any("trained on 8192 tokens" in note for note in model.placement.notes)
    with grok_local.load("tiny", context=1024) as model:
        assert any("trained on 512 tokens" in note for note in model.placement.notes)
    with grok_local.load("tiny", context=0) as model:
        assert model.context_size == 512
        assert not any("trained" in note for note in model.placement.notes)
    with grok_local.load(packed, context=0) as model:
        assert model.context_size == 8192
        assert not any("trained" in note for note in model.placement.notes)


def test_an_unknown_architecture_is_refused_before_llama_cpp_is_asked_to_load_it(tmp_path: Path) -> None:
    path = odd_file(tmp_path / "x.gguf", "grok-9", {"grok-9.block_count": 1})
    with pytest.raises(GGUFError, match="is newer, or is no language model"):
        grok_local.load(path)
