"""Opening Grok-2 as released: what lies where, and every problem listed at once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from grok_local.errors import CheckpointError
from grok_local.formats.safetensors import read_safetensors
from grok_local.models import grok2
from grok_local.models.grok2 import named_tensors
from grok_local.quantize.sources.checkpoint import fingerprint
from grok_local.quantize.sources.recognise import input_files, open_checkpoint
from samples.grok2_release import SMALL_2, write_release, write_safetensors

TP = "pytorch_model-{:05d}-TP-{}.safetensors"
PUBLISHED = list(named_tensors(grok2.RELEASE.published))


@pytest.fixture
def copy(small_grok2: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(small_grok2, tmp_path / "copy"))


def problems_of(folder: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return caught.value.problems


def changed(path: Path, change: Any) -> None:
    """Rewrite a file after `change` of its arrays by name."""
    data, arrays = path.read_bytes(), {}
    for name, info in read_safetensors(path).items():
        values = np.frombuffer(data[info.offset : info.offset + info.nbytes], ml_dtypes.bfloat16)
        arrays[name] = values.reshape(info.shape)
    change(arrays)
    write_safetensors(path, arrays)


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# By the release's file number: the name in layer 5, the GGUF's, the shape of a part, and how many ranks have one.
FILES = {
    0: ("model.embed_tokens.weight", "token_embd.weight", (131072, 8192), 1),
    1: ("lm_head.weight", "output.weight", (131072, 8192), 1),
    2: ("model.norm.weight", "output_norm.weight", (8192,), 1),
    3: ("model.layers.5.mlp.gate_proj.weight", "blk.5.ffn_gate.weight", (32768, 8192), 1),
    4: ("model.layers.5.mlp.down_proj.weight", "blk.5.ffn_down.weight", (8192, 32768), 1),
    5: ("model.layers.5.mlp.up_proj.weight", "blk.5.ffn_up.weight", (32768, 8192), 1),
    6: ("model.layers.5.block_sparse_moe.experts.7.w1.weight", "blk.5.ffn_gate_exps.weight", (2048, 8192), 8),
    7: ("model.layers.5.block_sparse_moe.experts.7.w2.weight", "blk.5.ffn_down_exps.weight", (8192, 2048), 8),
    8: ("model.layers.5.block_sparse_moe.experts.7.w3.weight", "blk.5.ffn_up_exps.weight", (2048, 8192), 8),
    9: ("model.layers.5.self_attn.k_proj.weight", "blk.5.attn_k.weight", (1024, 8192), 1),
    10: ("model.layers.5.self_attn.o_proj.weight", "blk.5.attn_output.weight", (8192, 8192), 1),
    11: ("model.layers.5.self_attn.q_proj.weight", "blk.5.attn_q.weight", (8192, 8192), 1),
    12: ("model.layers.5.self_attn.v_proj.weight", "blk.5.attn_v.weight", (1024, 8192), 1),
    13: ("model.layers.5.pre_attn_norm.weight", "blk.5.attn_norm.weight", (8192,), 1),
    14: ("model.layers.5.post_attn_norm.weight", "blk.5.attn_output_norm.weight", (8192,), 1),
    15: ("model.layers.5.pre_moe_norm.weight", "blk.5.ffn_norm.weight", (8192,), 1),
    16: ("model.layers.5.post_moe_norm.weight", "blk.5.post_ffw_norm.weight", (8192,), 1),
    17: ("model.layers.5.block_sparse_moe.gate.weight", "blk.5.ffn_gate_inp.weight", (8, 8192), 1),
}


def test_the_releases_names_files_and_shards() -> None:
    by_name = {name: tensor for tensor in PUBLISHED for name in tensor.names}
    assert {tensor.file for tensor in PUBLISHED} == set(FILES)
    for number, (name, target, part, ranks) in FILES.items():
        tensor = by_name[name]
        whole = tuple(size * (ranks if axis == tensor.axis else 1) for axis, size in enumerate(part))
        assert (tensor.file, tensor.target.name) == (number, target)
        assert tensor.target.shape[-len(part) :] == whole
        assert (tensor.axis is None) == (ranks == 1)
    assert [by_name[FILES[number][0]].axis for number in (6, 7, 8)] == [0, 1, 0]


def test_the_releases_size() -> None:
    weights = sum(int(np.prod(tensor.target.shape, dtype=np.int64)) for tensor in PUBLISHED)
    assert weights == 269_515_497_472
    assert sum(len(tensor.names) for tensor in PUBLISHED) == 3 + 64 * (12 + 24)
    files = {
        tensor.file_name(rank) for tensor in PUBLISHED for rank in (range(8) if tensor.axis is not None else [None])
    }
    assert len(files) == 39
    assert TP.format(7, "003") in files
    assert TP.format(17, "common") in files


def test_everything_is_found(small_grok2: Path) -> None:
    opened = open_checkpoint(small_grok2)
    assert opened.release == grok2.RELEASE
    assert opened.dimensions == SMALL_2.dimensions()
    assert len(opened.tensors) == 3 + 15 * SMALL_2.layers
    assert opened.nbytes == sum(path.stat().st_size for path in small_grok2.glob("*.safetensors"))
    tensor = next(tensor for tensor in opened.tensors if tensor.target.name == "blk.1.ffn_down_exps.weight")
    assert tensor.where == "model.layers.1.block_sparse_moe.experts.*.w2.weight"
    assert [path.name for path in tensor.paths] == [TP.format(7, f"{rank:03d}") for rank in range(8)]
    assert [shard.columns for shard in tensor.matrices[0]] == [range(first, first + 32) for first in range(0, 256, 32)]
    assert {small_grok2 / "config.json", small_grok2 / "tokenizer.tok.json", *tensor.paths} <= input_files(opened)


def test_tensors_go_by_their_names_and_not_by_their_files(small_grok2: Path, copy: Path) -> None:
    before = fingerprint(open_checkpoint(small_grok2))
    for path in copy.glob("*.safetensors"):
        path.rename(path.with_name(path.name.replace("pytorch_model-000", "model-1")))
    assert fingerprint(open_checkpoint(copy)) == before


def test_every_shard_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    """Also where shards are so large that only samples are read."""
    spec = replace(SMALL_2, layers=1, width=1024, expert_width=512)
    folder = write_release(tmp_path / "large", spec)
    digests = {fingerprint(open_checkpoint(folder))}
    for rank in range(8):
        path = folder / TP.format(6, f"{rank:03d}")
        data = bytearray(path.read_bytes())
        for name, info in read_safetensors(path).items():
            if ".experts.1." in name:
                data[info.offset + 1] ^= 1
        path.write_bytes(data)
        digests.add(fingerprint(open_checkpoint(folder)))
    assert len(digests) == 9


def test_a_missing_shard_of_each_kind(copy: Path) -> None:
    for name in (TP.format(6, "003"), TP.format(7, "007"), TP.format(4, "common"), TP.format(1, "common")):
        (copy / name).unlink()
    assert sorted(problems_of(copy)) == [
        "lm_head.weight: missing; the release has it in pytorch_model-00001-TP-common.safetensors",
        "model.layers.0.block_sparse_moe.experts.0.w1.weight and 7 more: one of its 8 shards is missing; the release "
        "has it in pytorch_model-00006-TP-003.safetensors",
        "model.layers.0.block_sparse_moe.experts.0.w2.weight and 7 more: one of its 8 shards is missing; the release "
        "has it in pytorch_model-00007-TP-007.safetensors",
        "model.layers.0.mlp.down_proj.weight and 1 more: missing; the release has it in "
        "pytorch_model-00004-TP-common.safetensors",
    ]


def test_all_ranks_missing(copy: Path) -> None:
    for path in copy.glob("*-00008-TP-*"):
        path.unlink()
    (problem,) = problems_of(copy)
    assert problem.startswith("model.layers.0.block_sparse_moe.experts.0.w3.weight and 7 more: missing")


def test_shards_that_disagree(copy: Path) -> None:
    def shape(arrays: dict[str, Any]) -> None:
        arrays["model.layers.0.block_sparse_moe.experts.1.w1.weight"] = np.ones((31, 256), ml_dtypes.bfloat16)

    def dtype(arrays: dict[str, Any]) -> None:
        arrays["model.layers.1.block_sparse_moe.experts.2.w2.weight"] = np.ones((256, 32), np.float32)

    changed(copy / TP.format(6, "002"), shape)
    changed(copy / TP.format(7, "004"), dtype)
    assert problems_of(copy) == (
        "model.layers.0.block_sparse_moe.experts.1.w1.weight: has shape [31, 256] in "
        "pytorch_model-00006-TP-002.safetensors, where [32, 256] is due",
        "model.layers.1.block_sparse_moe.experts.2.w2.weight: is of type F32 in pytorch_model-00007-TP-004.safetensors"
        ", and of BF16 elsewhere",
    )


def test_shards_that_make_no_whole(copy: Path) -> None:
    set_config(copy, moe_intermediate_size=240)
    assert any(
        "w1.weight and 15 more: has shards of shape [32, 256], of which no number makes [240, 256]" in line
        for line in problems_of(copy)
    )
    set_config(copy, moe_intermediate_size=224)
    assert any("has a shard too many in pytorch_model-00006-TP-007" in line for line in problems_of(copy))


def test_wrong_shapes_and_types(copy: Path) -> None:
    def change(arrays: dict[str, Any]) -> None:
        arrays["model.layers.0.self_attn.q_proj.weight"] = np.ones((256, 128), ml_dtypes.bfloat16)
        arrays["model.layers.1.self_attn.q_proj.weight"] = np.ones((256, 256), np.int8)
        arrays["model.layers.2.self_attn.q_proj.weight"] = np.ones((256, 256), ml_dtypes.bfloat16)

    changed(copy / TP.format(11, "common"), change)
    assert sorted(problems_of(copy)) == [
        "model.layers.0.self_attn.q_proj.weight: has shape [256, 128] in pytorch_model-00011-TP-common.safetensors, "
        "where [256, 256] is due",
        "model.layers.1.self_attn.q_proj.weight: is of type I8 in pytorch_model-00011-TP-common.safetensors, where "
        "BF16 is due, or F16 or F32",
        "pytorch_model-00011-TP-common.safetensors: model.layers.2.self_attn.q_proj.weight: a tensor nobody expects",
    ]


def test_a_tensor_in_two_files(copy: Path) -> None:
    shutil.copyfile(copy / TP.format(2, "common"), copy / TP.format(18, "common"))
    shutil.copyfile(copy / TP.format(6, "001"), copy / TP.format(19, "common"))
    problems = problems_of(copy)
    assert f"model.norm.weight: is in {TP.format(2, 'common')}, and in {TP.format(18, 'common')} again" in problems
    assert any("w1.weight and 7 more: is in pytorch_model-00006-TP-000" in line for line in problems)


def test_many_strangers_are_counted(copy: Path) -> None:
    strangers = {f"stranger\n{number}": np.ones(2, ml_dtypes.bfloat16) for number in range(500)}
    write_safetensors(copy / TP.format(20, "common"), strangers)
    problems = problems_of(copy)
    assert len(problems) == 41
    assert problems[-1] == "460 more tensors that nobody expects"
    assert "\n" not in "".join(problems)


def test_files_that_are_none(copy: Path, tmp_path: Path) -> None:
    (copy / TP.format(9, "common")).write_bytes(b"")
    (copy / TP.format(10, "common")).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    truncated = copy / TP.format(3, "common")
    truncated.write_bytes(truncated.read_bytes()[:-10])
    (copy / TP.format(17, "common")).unlink()
    (copy / TP.format(17, "common")).symlink_to("../blobs/17")
    problems = [line for line in problems_of(copy) if not line.startswith("model.layers.")]
    assert [line.partition(".safetensors: ")[2][:20] for line in problems] == [
        "truncated: 10 bytes ",
        "empty, fetch it agai",
        "a git-lfs pointer, n",
        "missing: the link le",
    ]


def test_one_rank_alone_and_files_without_rank(copy: Path) -> None:
    """A file whose name has no rank is none of the release's; it may be what somebody made of it."""
    write_safetensors(copy / "model.safetensors", {"x": np.ones(2, np.float32)})
    assert open_checkpoint(copy).tensors
    for path in copy.glob("*-TP-00[1-7]*"):
        path.unlink()
    assert len(problems_of(copy)) == 3 * 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "says nothing of a model"),
        ('{"hidden_size": "256"}', "hidden_size is '256', where a size is due"),
        ('{"num_hidden_layers": 1000000000}', "num_hidden_layers is 1000000000"),
        ('{"num_local_experts": true}', "num_local_experts is True"),
        ('{"rope_theta": NaN}', "rope_theta is nan, where a number is due"),
        ('{"rms_norm_eps": -1}', "rms_norm_eps is -1"),
        ('{"rms_norm_eps": 1' + "0" * 400 + "}", "rms_norm_eps is 1000"),
        ('{"num_experts_per_tok": 2.0}', "num_experts_per_tok is 2.0"),
        ('{"rope_type": "yarn"}', "rope_type is 'yarn': llama.cpp's graph for Grok has 'original' alone"),
        ('{"head_dim": 64, "residual_moe": false}', "residual_moe is False"),
        ('{"hidden_size": 1024}', "64 heads of 128 and a hidden size of 1024"),
        ('{"num_key_value_heads": 7}', "64 query heads cannot share 7 key heads"),
        ('{"num_local_experts": 1}', "routes every token to 2 of 1 experts"),
    ],
)
def test_configs_that_make_no_sense(copy: Path, text: str, words: str) -> None:
    (copy / "config.json").write_text(text)
    assert any(line.startswith("config.json: ") and words in line for line in problems_of(copy))


def test_without_a_config_nothing_is_guessed(copy: Path) -> None:
    (copy / "config.json").unlink()
    assert problems_of(copy) == ("config.json: missing; it is part of the release",)


def test_the_config_has_the_last_word_on_numbers(copy: Path) -> None:
    set_config(copy, rope_theta=10_000, attn_temperature_len=-1, output_multiplier_scale=0.25, eos_token_id=[1, 2])
    opened = open_checkpoint(copy)
    metadata = opened.release.metadata(opened.dimensions)
    assert (metadata["rope.freq_base"], metadata["logit_scale"]) == (10_000.0, 0.25)
    assert metadata["attention.temperature_length"] == 0
    assert isinstance(metadata["rope.freq_base"], float)


def test_other_numbers_of_ranks(tmp_path: Path) -> None:
    for ranks in (1, 2, 16):
        folder = write_release(tmp_path / str(ranks), replace(SMALL_2, layers=1, ranks=ranks))
        assert len(open_checkpoint(folder).tensors) == 18
