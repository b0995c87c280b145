"""Reading checkpoints: every row right, every hostile or wrong file refused in one line; and the hub."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import random_checkpoint as rc
from safetensors.torch import load_file, save_file

from kogc import hub
from kogc.checkpoint import all_finite, convert, expected_tensors, open_checkpoint, read_header, to_bf16, to_float32
from kogc.errors import KogcError
from kogc.importer import spec_from_dir
from kogc.spec import ModelSpec, load_spec

Q = "model.layers.1.self_attn.q_proj.weight"


def verify(path: Path, **changes: Any) -> ModelSpec:
    spec = replace(spec_from_dir(path)[0], **changes)
    open_checkpoint(path, spec).close()
    return spec


def refusal(path: Path, **changes: Any) -> str:
    """The one line with which a checkpoint is refused, without the directory."""
    with pytest.raises(KogcError) as caught:
        verify(path, **changes)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400
    assert str(path) in message
    return message.replace(f"{path}/", "")


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite model.safetensors after a change to its tensors."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def write_raw(file: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return file


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", rc.FAMILIES)
@pytest.mark.parametrize("shard_bytes", [None, 60000])
def test_rows_are_those_of_the_library(tmp_path: Path, family: str, shard_bytes: int | None) -> None:
    path = rc.make(tmp_path, family, shard_bytes=shard_bytes)
    spec, _ = spec_from_dir(path)
    expected = {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
    assert expected.keys() == expected_tensors(spec).keys()
    with open_checkpoint(path, spec) as checkpoint:
        assert checkpoint.notes == []
        assert len(checkpoint.files) == len(list(path.glob("*.safetensors")))
        assert (len(checkpoint.files) > 1) == bool(shard_bytes)
        for name, tensor in expected.items():
            n = tensor.shape[0]
            assert expected_tensors(spec)[name] == tuple(tensor.shape)
            assert np.array_equal(checkpoint.float_rows(name, 0, n), tensor.float().numpy())
            assert np.array_equal(checkpoint.float_rows(name, n // 3, n // 2), tensor[n // 3 : n // 2].float().numpy())
            assert checkpoint.rows(name, n, n).shape == (0, *tensor.shape[1:])
        assert np.array_equal(checkpoint.rows("lm_head.weight", 0, 3), checkpoint.rows("lm_head.weight", 0, 9)[:3])


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["bf16", "fp16"])
def test_other_dtypes_are_rounded_as_torch_rounds_them_and_it_says_so(tmp_path: Path, stored: str, wanted: str) -> None:
    path = rc.make(tmp_path, "llama", dtype=stored)
    spec = replace(spec_from_dir(path)[0], dtype=wanted)
    tensors = load_file(path / "model.safetensors")
    target = {"bf16": rc.torch.bfloat16, "fp16": rc.torch.float16}[wanted]
    with open_checkpoint(path, spec) as checkpoint:
        for name, tensor in tensors.items():
            expected = tensor.to(target).view(rc.torch.int16).numpy().view(np.uint16)
            assert np.array_equal(checkpoint.rows(name, 0, tensor.shape[0]), expected), name
        long = {"bf16": "bfloat16", "fp16": "float16"}[wanted]
        n = len(tensors)
        same = stored == long
        assert checkpoint.notes == ([] if same else [f"{path}: rounded from {stored} to {long}: {n} of {n} tensors"])


def test_rounding_to_bf16_is_to_nearest_even_for_every_kind_of_number() -> None:
    words = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    edges = np.array([0, 0x8000, 0x18000, 0x17FFF, 0x18001, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000], np.uint32)
    values = np.concatenate([words, edges, edges | np.uint32(1 << 31)]).view(np.float32)
    values = values[~np.isnan(values)]
    assert np.array_equal(to_bf16(values), values.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert np.isnan(to_float32(to_bf16(np.array([np.nan, -np.nan], np.float32)), "bf16")).all()
    # All ones after the mantissa of a NaN must not carry into infinity.
    assert np.isnan(to_float32(to_bf16(np.array([0x7FFFFFFF], np.uint32).view(np.float32)), "bf16")).all()


def test_every_16_bit_pattern_widens_exactly() -> None:
    bits = np.arange(1 << 16).astype(np.uint16)
    assert np.array_equal(to_float32(bits, "fp16"), bits.view(np.float16).astype(np.float32), equal_nan=True)
    assert np.array_equal(to_float32(bits, "bf16"), bits.view(ml_dtypes.bfloat16).astype(np.float32), equal_nan=True)
    assert convert(bits, "bf16", "bf16") is not None
    assert np.array_equal(convert(bits, "bf16", "bf16"), bits)


def test_a_weight_too_large_for_fp16_is_refused_not_made_infinite(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "llama")
    edit(path, lambda tensors: tensors[Q].__setitem__((3, 4), 1e6))
    spec = replace(spec_from_dir(path)[0], dtype="fp16")
    with open_checkpoint(path, spec) as checkpoint:
        assert checkpoint.rows(Q, 0, 3).shape == (3, 96)
        with pytest.raises(KogcError, match=f"model.safetensors: {Q}: holds 999424, which float16 cannot hold"):
            checkpoint.rows(Q, 3, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_weight_that_is_no_number_is_refused(tmp_path: Path, dtype: str, value: float) -> None:
    path = rc.make(tmp_path, "llama", dtype=dtype)
    edit(path, lambda tensors: tensors[Q].__setitem__((3, 4), value))
    with open_checkpoint(path, spec_from_dir(path)[0]) as checkpoint:
        assert checkpoint.rows(Q, 0, 3).shape == (3, 96)
        with pytest.raises(KogcError, match=f"model.safetensors: {Q}: holds {value:g}: the weights are broken"):
            checkpoint.rows(Q, 0, 9)


def test_the_check_for_numbers_knows_every_pattern() -> None:
    for dtype in ("bf16", "fp16"):
        bits = np.arange(1 << 16).astype(np.uint16)
        finite = [all_finite(bits[i : i + 1], dtype) for i in range(1 << 16)]
        assert np.array_equal(finite, np.isfinite(to_float32(bits, dtype)))


def test_rows_outside_the_tensor_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "llama")
    with open_checkpoint(path) as checkpoint:
        with pytest.raises(ValueError, match="verify"):
            checkpoint.rows(Q, 0, 1)
        checkpoint.verify(spec_from_dir(path)[0])
        for start, stop in ((-1, 1), (2, 1), (0, 193)):
            with pytest.raises(IndexError):
                checkpoint.rows(Q, start, stop)


def test_reading_a_few_rows_does_not_hold_the_tensor(tmp_path: Path) -> None:
    """A sparse file of 4 GiB, with 256 MiB of address space left: only a reader that streams can read it."""
    spec = replace(load_spec("llama-3.2-1b"), layers=1, vocab=1 << 20)
    header, offset = {}, 0
    for name, shape in expected_tensors(spec).items():
        size = int(np.prod(shape)) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    file = write_raw(tmp_path / "model.safetensors", json.dumps(header).encode())
    os.truncate(file, file.stat().st_size + offset)
    (tmp_path / "config.json").write_text("{}")
    assert offset > 1 << 32
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), hard))
    try:
        with open_checkpoint(tmp_path, spec) as checkpoint:
            assert not checkpoint.rows("model.embed_tokens.weight", (1 << 20) - 4, 1 << 20).any()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- what the spec needs ---------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "llama")
    edit(path, lambda tensors: tensors.pop(Q))
    assert refusal(path) == f"model.safetensors: {Q}: missing tensor, expected with shape [192, 96]"


def test_a_head_may_be_absent_only_when_tied(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "llama")
    edit(path, lambda tensors: tensors.pop("lm_head.weight"))
    assert refusal(path) == "model.safetensors: lm_head.weight: missing tensor, expected with shape [331, 96]"
    verify(path, tied_embeddings=True)


def test_a_copy_of_a_tied_head_is_welcome_and_another_head_is_not(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "qwen2")
    edit(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    verify(path)
    edit(path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].float()}))
    verify(path)
    edit(path, lambda t: t["lm_head.weight"].__setitem__((330, 95), 9.0))
    assert refusal(path) == (
        "model.safetensors: lm_head.weight: differs from model.embed_tokens.weight, "
        "although the two are tied (tie_word_embeddings)"
    )


def test_a_tied_table_may_be_stored_as_the_head_alone(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "llama", tie_word_embeddings=True)
    expected = rc.reference_logits(path, [5, 9, 300])
    edit(path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert np.array_equal(rc.reference_logits(path, [5, 9, 300]), expected)
    table = load_file(path / "model.safetensors")["lm_head.weight"].float().numpy()
    with open_checkpoint(path, spec_from_dir(path)[0]) as checkpoint:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert np.array_equal(checkpoint.float_rows(name, 0, 331), table)
    assert refusal(path, tied_embeddings=False).startswith(
        "model.safetensors: model.embed_tokens.weight: missing tensor"
    )


def without_prefix(path: Path) -> None:
    """As AutoModel saves a model, and embedding models are published."""
    file = path / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def test_a_model_saved_without_its_head_has_other_names(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "qwen3", tie_word_embeddings=True)
    expected = rc.reference_logits(path, [5, 9, 300])
    without_prefix(path)
    assert np.array_equal(rc.reference_logits(path, [5, 9, 300]), expected)
    with open_checkpoint(path, spec_from_dir(path)[0]) as checkpoint:
        assert checkpoint.tensors[Q].name == Q.removeprefix("model.")
        assert checkpoint.rows("lm_head.weight", 0, 3).shape == (3, 96)
    edit(path, lambda tensors: tensors.pop("norm.weight"))
    assert refusal(path) == "model.safetensors: model.norm.weight: missing tensor, expected with shape [96]"
    other = rc.make(tmp_path, "llama")  # its head is its own
    without_prefix(other)
    verify(other)
    edit(other, lambda tensors: tensors.pop("lm_head.weight"))
    assert refusal(other) == "model.safetensors: lm_head.weight: missing tensor, expected with shape [331, 96]"


def test_a_wrong_shape_says_both(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "llama")
    edit(path, lambda tensors: tensors.update({Q: tensors[Q].T.contiguous()}))
    assert refusal(path) == f"model.safetensors: {Q}: has shape [96, 192], the spec needs [192, 96]"


def test_a_wrong_dtype_is_refused(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "llama")
    edit(path, lambda tensors: tensors.update({Q: tensors[Q].to(rc.torch.float8_e4m3fn)}))
    assert refusal(path) == f"model.safetensors: {Q}: has dtype F8_E4M3, only BF16, F16, F32 can be read"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.down_proj.bias",
        "model.layers.0.mlp.down_proj.weight_scale",
        "model.layers.3.input_layernorm.weight",
        "score.weight",
    ],
)
def test_a_tensor_that_would_change_the_result_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = rc.make(tmp_path, "llama")
    edit(path, lambda tensors: tensors.update({name: rc.torch.ones(4)}))
    assert refusal(path) == f"model.safetensors: {name}: a tensor that a llama model of this config.json does not have"


def test_recomputed_buffers_are_ignored(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "llama")
    edit(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": rc.torch.ones(16)}))
    verify(path)


# --- hostile files ---------------------------------------------------------------------------------------------------


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "BF16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": (b"", b"", None, "header is not valid JSON"),
    "huge header": (b"{}", b"", 1 << 60, "its header would have 1152921504606846976 bytes"),
    "long header": (b"{}", b"", 1000, "truncated: header says 1008 bytes, the file has 10"),
    "not json": (b"{'a': 1}", b"", None, "header is not valid JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", None, "header is not valid JSON"),
    "not an object": (b"[1, 2]", b"", None, "header is not a JSON object"),
    "deep": (b'{"a": ' + b"[" * 200_000, b"", None, "header is nested too deeply"),
    "long number": (b'{"a": ' + b"9" * 10_000 + b"}", b"", None, "header is not valid JSON"),
    "twice": (b'{"a": 1, "a": 2}', b"", None, "a is there twice"),
    "entry": (b'{"a": 7}', b"", None, "a: header entry without dtype, shape and data_offsets"),
    "newline": (b'{"a\\nb": 7}', b"", None, "'a\\nb': header entry without"),
    "dtype": (entry([1], 0, 2, "Q4_0"), b"xx", None, "w: unknown dtype Q4_0"),
    "dtype type": (entry([1], 0, 2, ["BF16"]), b"xx", None, "w: unknown dtype ['BF16']"),
    "negative shape": (entry([-1], 0, 2), b"xx", None, "w: shape is not a list of up to 8 sizes"),
    "boolean shape": (entry([True], 0, 2), b"xx", None, "w: shape is not a list of up to 8 sizes"),
    "high rank": (entry([1] * 9, 0, 2), b"xx", None, "w: shape is not a list of up to 8 sizes"),
    "overflowing shape": (entry([1 << 40, 1 << 40], 0, 2), b"xx", None, "takes 2417851639229258349412352 bytes, not 2"),
    "offsets type": (entry([1], "0", 2), b"xx", None, "w: data_offsets is not a pair of positions"),
    "negative offset": (entry([1], -2, 0), b"xx", None, "w: data_offsets is not a pair of positions"),
    "reversed": (entry([1], 2, 0), b"xx", None, "w: shape [1] of BF16 takes 2 bytes, not -2"),
    "size": (entry([3], 0, 4), b"xxxx", None, "w: shape [3] of BF16 takes 6 bytes, not 4"),
    "gap": (entry([1], 2, 4), b"xxxx", None, "w: leaves a gap of 2 bytes before it"),
    "truncated": (entry([8], 0, 16), b"x" * 15, None, "truncated: header says"),
    "too long": (entry([8], 0, 16), b"x" * 17, None, "too long: header says"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_one_line(tmp_path: Path, case: str) -> None:
    header, data, length, expected = HOSTILE[case]
    raw = header if isinstance(header, bytes) else json.dumps({"__metadata__": {}, "w": header}).encode()
    file = write_raw(tmp_path / "model.safetensors", raw, data, length)
    with pytest.raises(KogcError) as caught:
        read_header(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert expected in message
    assert message.isprintable()
    assert len(message) < 400


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    header = {"a": entry([4], 0, 8), "b": entry([4], 4, 12)}
    file = write_raw(tmp_path / "model.safetensors", json.dumps(header).encode(), b"x" * 12)
    with pytest.raises(KogcError, match=r"model.safetensors: b: overlaps the tensor before it"):
        read_header(file)


def test_a_file_cut_anywhere_is_refused_and_says_both_sizes(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "llama")
    file = path / "model.safetensors"
    size = file.stat().st_size
    for cut in (size - 1, size // 2, 9000):
        os.truncate(file, cut)
        assert refusal(path) == f"model.safetensors: truncated: header says {size} bytes, the file has {cut}"
    os.truncate(file, 100)
    assert "truncated: header says" in refusal(path)
    os.truncate(file, 5)
    assert refusal(path) == "model.safetensors: truncated: 5 bytes are not a safetensors file"


def test_something_else_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "llama")
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")  # opening it would wait for ever
    assert refusal(path) == "model.safetensors: not a regular file"


def test_a_directory_without_weights_says_what_it_has(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "llama")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(
        KogcError, match=r"neither model.safetensors nor .* \(found pytorch_model.bin, which is not read"
    ):
        open_checkpoint(path)
    (path / "config.json").unlink()
    with pytest.raises(KogcError, match=r"config.json: missing"):
        open_checkpoint(path)
    with pytest.raises(KogcError, match=r"none: no such checkpoint directory"):
        open_checkpoint(tmp_path / "none")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None, "x\n"])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, shard: object) -> None:
    path = rc.make(tmp_path, "llama", shard_bytes=60000)
    index = path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"][Q] = shard
    index.write_text(json.dumps(table))
    message = refusal(path)
    assert message.startswith(f"model.safetensors.index.json: {Q}: ")
    assert message.endswith("is not a name of a safetensors file")


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path) -> None:
    path = rc.make(tmp_path, "llama", shard_bytes=60000)
    index = path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    shard = table["weight_map"][Q]
    other = next(name for name in table["weight_map"].values() if name != shard)
    index.write_text(json.dumps({**table, "weight_map": {**table["weight_map"], Q: other}}))
    assert refusal(path) == f"{other}: {Q}: missing, although model.safetensors.index.json places it here"
    index.write_text(json.dumps({**table, "weight_map": {**table["weight_map"], "x": shard}}))
    assert refusal(path) == f"{shard}: x: missing, although model.safetensors.index.json places it here"
    index.write_text(json.dumps({**table, "weight_map": []}))
    assert "weight_map: expected an object" in refusal(path)
    index.write_text("{")
    assert refusal(path).startswith("model.safetensors.index.json:1: not JSON")
    index.write_text(json.dumps(table))
    (path / other).write_bytes((path / shard).read_bytes())
    assert "is in model-0000" in refusal(path)
    (path / other).unlink()
    assert refusal(path) == f"{other}: missing, although model.safetensors.index.json names it"


# --- the hub ---------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_offline_process(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """huggingface_hub reads its environment when it is imported, so each case is a process of its own."""
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True)


def test_a_cached_model_is_found_offline_with_its_commit(tmp_path: Path) -> None:
    repo = tmp_path / "cache" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    (repo / "snapshots" / COMMIT / "config.json").write_text("{}")
    done = in_offline_process(
        tmp_path,
        f"""
        from kogc.hub import resolve
        for model in ("org/name", "org/name@main", "org/name@{COMMIT}"):
            path, commit = resolve(model)
            print(path.name, (path / "config.json").is_file(), commit)
        """,
    )
    assert done.stdout == f"{COMMIT} True {COMMIT}\n" * 3, done.stderr


def test_a_model_that_is_not_cached_offline_is_one_line(tmp_path: Path) -> None:
    done = in_offline_process(
        tmp_path,
        """
        from kogc.errors import KogcError
        from kogc.hub import resolve
        try:
            resolve("org/none@v1")
        except KogcError as err:
            print(err)
        """,
    )
    assert done.stdout == "org/none@v1: no such directory, not in the cache, and HF_HUB_OFFLINE is set\n", done.stderr


def test_of_the_hub_only_what_a_build_reads_is_fetched() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors-00001-of-00002.safetensors",
    ]
    other = [
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        "README.md",
    ]
    assert list(filter_repo_objects(wanted + other, allow_patterns=hub.PATTERNS)) == wanted


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert hub.resolve(str(tmp_path)) == (tmp_path, None)


@pytest.mark.parametrize(
    "model", ["no-such-thing", "./a/b", "a/b/c", "/no/such", "a/b@", "a/../b", "a/b@../c", "-a/b", ""]
)
def test_what_is_neither_directory_nor_hub_id_is_one_line(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_download", lambda *a: pytest.fail("asked the hub"))
    with pytest.raises(KogcError, match=r"^[^\n]*: no such directory, and not a hub id"):
        hub.resolve(model)


def test_without_the_extra_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(KogcError, match=r"^org/name: no such directory; hub models need .*install kogc\[hub\]\)$"):
        hub.resolve("org/name")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("GatedRepoError", "org/name@v2: access is restricted: accept its terms on the hub and log in"),
        ("RevisionNotFoundError", "org/name@v2: the hub has org/name, but no revision v2"),
        ("RepositoryNotFoundError", "org/name@v2: no such directory, and no such model on the hub (or it is private)"),
        ("ConnectionError", "org/name@v2: cannot be fetched from the hub: first line"),
    ],
)
def test_errors_of_the_hub_are_one_line(monkeypatch: pytest.MonkeyPatch, error: str, line: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error, None) or ConnectionError
    raised = kind.__new__(kind)
    raised.args = ("first line\nsecond line",)
    asked: list[Any] = []

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(KogcError) as caught:
        hub.resolve("org/name@v2")
    assert str(caught.value) == line
    assert asked == [("org/name", "v2")]
