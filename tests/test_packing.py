"""Weights from a checkpoint to the slab and back, and the layout itself element by element."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import random_checkpoint as rc

from kogc import packing, rope
from kogc.checkpoint import Checkpoint, expected_tensors, open_checkpoint, to_float32
from kogc.errors import KogcError
from kogc.importer import spec_from_dir
from kogc.kv_layout import pack_kv, unpack_kv
from kogc.kv_numbers import DECODED, from_fp8, round_kv, to_fp8
from kogc.packing import SlabWeights, operands, pack_rows, total_bytes, unpack_rows, write_weights
from kogc.plan.matvec import MatVec, cut
from kogc.plan.plan import Options, Plan, make_plan
from kogc.profile import load_profile
from kogc.reference import Reference
from kogc.spec import ModelSpec, load_spec

CASES = {
    "llama-7-blocks": ("llama", {}, 7),
    "mistral-1-block": ("mistral", {"head_dim": 64}, 1),
    "qwen2-more-blocks-than-units": ("qwen2", {}, 61),
    "qwen3-fp16": ("qwen3", {"dtype": "float16", "tie_word_embeddings": True}, 13),
    "llama-fp32-odd": (
        "llama",
        {"dtype": "float32", "hidden_size": 102, "intermediate_size": 106, "vocab_size": 301},
        5,
    ),
    "llama-sharded": ("llama", {"shard_bytes": 60000}, 16),
}


def plan_of(spec: ModelSpec, blocks: int) -> Plan:
    return make_plan(spec, load_profile("cpu-avx2"), Options(blocks=blocks))


def packed(tmp_path: Path, family: str, overrides: dict, blocks: int) -> tuple[Plan, Checkpoint, Path]:
    path = rc.make(tmp_path, family, **overrides)
    spec, _ = spec_from_dir(path)
    plan = plan_of(spec, blocks)
    checkpoint = open_checkpoint(path, spec)
    out = tmp_path / "weights.bin"
    write_weights(plan, checkpoint, out)
    return plan, checkpoint, out


def reader(path: Path):
    data = path.read_bytes()
    return lambda offset, n: data[offset : offset + n]


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_comes_back(tmp_path: Path, case: str) -> None:
    plan, checkpoint, out = packed(tmp_path, *CASES[case])
    assert out.stat().st_size == total_bytes(plan)
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["weights.bin"]
    slabs = SlabWeights(plan, reader(out))
    with checkpoint:
        for name, shape in {**expected_tensors(plan.spec), "lm_head.weight": (plan.spec.vocab,)}.items():
            expected = checkpoint.float_rows(name, 0, shape[0])
            assert np.array_equal(slabs.tensor(name), expected), name
            middle = slice(shape[0] // 3, shape[0] // 3 + 5)
            assert np.array_equal(slabs.float_rows(name, middle.start, middle.stop), expected[middle]), name
            assert slabs.float_rows(name, 2, 2).size == 0
    assert np.array_equal(slabs.inv_freq(), rope.inv_freq(plan.spec))


def test_weights_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    """The only other test to trust here is one that reads the file with foreign code."""
    from safetensors.torch import load_file

    plan, checkpoint, out = packed(tmp_path, *CASES["llama-7-blocks"])
    slabs = SlabWeights(plan, reader(out))
    tensors = load_file(checkpoint.files[0])
    checkpoint.close()
    assert tensors.keys() == expected_tensors(plan.spec).keys()
    for name, tensor in tensors.items():
        assert np.array_equal(slabs.tensor(name), tensor.float().numpy()), name


@pytest.mark.parametrize("case", ["llama-7-blocks", "qwen3-fp16"])
def test_the_slab_is_laid_out_as_stated(tmp_path: Path, case: str) -> None:
    """Every element of the slabs is where the stated layout puts it, all else zero: by scalar code, not numpy axes."""
    plan, checkpoint, out = packed(tmp_path, *CASES[case])
    spec, slabs = plan.spec, operands(plan)[0]
    expected = np.zeros(slabs.bytes // 2, np.uint16)
    q, kv = spec.q_rows, spec.kv_rows
    with checkpoint:
        whole = {name: checkpoint.rows(name, 0, shape[0]) for name, shape in expected_tensors(spec).items()}
    whole.setdefault("lm_head.weight", whole["model.embed_tokens.weight"])
    for layer in range(spec.layers + 1):
        at = f"model.layers.{layer}."
        for phase in plan.layer_phases if layer < spec.layers else (plan.head,):
            for block in range(plan.blocks):
                start = (block * plan.slab_bytes + plan.slab_offset(layer, phase, block)) // 2
                first = phase.first_unit(block) * phase.unit
                for i, row in enumerate(phase.rows_of(block)):
                    assert row == first + i
                    if phase.name == "qkv":
                        part, r = ("q", row) if row < q else ("k", row - q) if row < q + kv else ("v", row - q - kv)
                        values = whole[f"{at}self_attn.{part}_proj.weight"][r]
                    elif phase.name == "gate_up":
                        values = whole[f"{at}mlp.{'up' if row % 2 else 'gate'}_proj.weight"][row // 2]
                    elif phase.name == "head":
                        values = whole["lm_head.weight"][row]
                    else:
                        name = {"o": "self_attn.o_proj", "down": "mlp.down_proj"}[phase.name]
                        values = whole[f"{at}{name}.weight"][row]
                    unit_start = start + i // phase.unit * phase.unit * phase.columns_padded
                    for c in range(0, phase.columns, 32):
                        if phase.unit == 8:
                            place = c // 32 * 256 + i % 8 * 32
                        else:
                            place = c // 64 * 256 + c % 64 // 32 * 128 + i % 4 * 32
                        run = values[c : c + 32]
                        expected[unit_start + place : unit_start + place + len(run)] = run
    assert out.read_bytes()[: slabs.bytes] == expected.tobytes()


@pytest.mark.parametrize("rows", [1, 37, 64, 331])
@pytest.mark.parametrize("columns", [32, 100, 512, 576])
@pytest.mark.parametrize("unit", [8, 4])
def test_pack_rows_round_trip(rows: int, columns: int, unit: int) -> None:
    phase = MatVec("o", rows, columns, unit, 6, 4)
    values = np.random.default_rng(rows).integers(1, 1 << 16, (rows, columns)).astype(np.uint16)
    weights = 0
    for block in range(phase.blocks):
        own = phase.rows_of(block)
        mine = values[own.start : own.stop]
        data = pack_rows(phase, block, mine)
        assert len(data) == phase.bytes_of(block)
        assert np.array_equal(unpack_rows(phase, block, data), mine)
        weights += np.count_nonzero(np.frombuffer(data, np.uint16))
    assert weights == rows * columns  # each weight once, all else zero


def test_pack_rows_refuses_another_number_of_rows() -> None:
    phase = cut("o", 64, 64, 4, 0)
    with pytest.raises(ValueError, match="block 1 has 16 rows of 64 columns"):
        pack_rows(phase, 1, np.zeros((8, 64), np.uint16))


def test_operands_are_aligned_and_only_those_of_the_model() -> None:
    names = {
        "llama-3.2-1b": ["slabs", "embedding", "norms", "inv_freq"],
        "qwen3-0.6b": ["slabs", "embedding", "norms", "qk_norms", "inv_freq"],
        "qwen2.5-1.5b": ["slabs", "embedding", "norms", "qkv_bias", "inv_freq"],
    }
    for name, expected in names.items():
        plan = plan_of(load_spec(name), 132)
        arrays = operands(plan)
        assert [a.name for a in arrays] == expected
        end = 0
        for a in arrays:
            assert a.offset % 4096 == 0
            assert 0 <= a.offset - end < 4096
            assert a.bytes == np.prod(a.shape) * np.dtype(a.dtype).itemsize
            end = a.offset + a.bytes
        assert 0 <= total_bytes(plan) - end < 4096


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, checkpoint, out = packed(tmp_path, *CASES["llama-7-blocks"])
    monkeypatch.setattr(packing, "JOB_BYTES", 1)
    with checkpoint:
        write_weights(plan, checkpoint, tmp_path / "again.bin")
    assert out.read_bytes() == (tmp_path / "again.bin").read_bytes()


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    plan, checkpoint, _ = packed(tmp_path, *CASES["qwen3-fp16"])
    seen: list[tuple[int, int]] = []
    with checkpoint:
        write_weights(plan, checkpoint, tmp_path / "again.bin", lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_packing_takes_memory_for_a_few_pieces_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = {"vocab_size": 20011, "hidden_size": 384, "intermediate_size": 1536, "dtype": "float32"}
    plan, checkpoint, out = packed(tmp_path, "llama", overrides, 8)
    monkeypatch.setattr(packing, "JOB_BYTES", 1 << 17)
    tracemalloc.start()
    try:
        with checkpoint:
            write_weights(plan, checkpoint, out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < total_bytes(plan) / 10


def test_a_reference_on_slabs_is_one_on_the_checkpoint(tmp_path: Path) -> None:
    plan, checkpoint, out = packed(tmp_path, *CASES["qwen2-more-blocks-than-units"])
    with checkpoint:
        direct = Reference(plan.spec, checkpoint).logits([1, 2, 3, 200])
    assert np.array_equal(Reference(plan.spec, SlabWeights(plan, reader(out))).logits([1, 2, 3, 200]), direct)


def test_nothing_is_left_when_reading_fails(tmp_path: Path) -> None:
    plan, checkpoint, out = packed(tmp_path, *CASES["llama-7-blocks"])
    before = out.read_bytes()
    file = checkpoint.files[0]
    os.truncate(file, file.stat().st_size // 2)
    with checkpoint, pytest.raises(KogcError, match=r"model.safetensors: .*the file became shorter while it was read"):
        write_weights(plan, checkpoint, out)
    assert out.read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["llama-0", "weights.bin"]


def test_nothing_is_left_after_ctrl_c(tmp_path: Path) -> None:
    plan, checkpoint, out = packed(tmp_path, *CASES["llama-7-blocks"])
    out.unlink()

    def interrupt(done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)

    with checkpoint, pytest.raises(KeyboardInterrupt):
        write_weights(plan, checkpoint, out, interrupt)
    assert [f.name for f in tmp_path.iterdir()] == ["llama-0"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: both come back from the same calls."""
    plan, checkpoint, out = packed(tmp_path, *CASES["llama-7-blocks"])
    checkpoint.close()
    out.unlink()
    script = f"""
        import resource, sys
        from kogc.checkpoint import open_checkpoint
        from kogc.errors import KogcError
        from kogc.importer import spec_from_dir
        from kogc.packing import write_weights
        from kogc.plan.plan import Options, make_plan
        from kogc.profile import load_profile
        spec, _ = spec_from_dir({str(checkpoint.path)!r})
        plan = make_plan(spec, load_profile("cpu-avx2"), Options(blocks={plan.blocks}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            write_weights(plan, open_checkpoint({str(checkpoint.path)!r}, spec), {str(out)!r})
        except KogcError as err:
            sys.exit(str(err))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"{out}: cannot write: File too large\n"
    assert [f.name for f in tmp_path.iterdir()] == ["llama-0"]


def test_a_missing_directory_is_one_line(tmp_path: Path) -> None:
    plan, checkpoint, _ = packed(tmp_path, *CASES["llama-7-blocks"])
    with checkpoint, pytest.raises(KogcError, match=r"none/weights.bin: cannot write: No such file or directory"):
        write_weights(plan, checkpoint, tmp_path / "none" / "weights.bin")


def key_place(target: str, lanes: int, dim: int, inside: int, d: int) -> int:
    """Number of a key's dimension among the numbers of its tile (a chunk on `cpu`)."""
    r = inside % 16
    if target == "cuda":
        return (d // 16 * 32 + (r % 8) * 4 + d % 16 // 4) * 8 + d % 4 // 2 * 4 + r // 8 * 2 + d % 2
    return (d // 8 * 16 + r) * 8 + d % 8 if target == "hip" else inside * dim + d


def value_place(target: str, lanes: int, dim: int, inside: int, d: int) -> int:
    r = inside % 16
    if target == "cuda":
        return (d // 16 * 32 + (d % 8) * 4 + (r % 8) // 2) * 8 + (d % 16) // 8 * 4 + r % 2 + 2 * (r // 8)
    if target == "cpu":
        return inside * dim + d
    n = 256 // lanes  # positions of a lane
    load, group = divmod(d // 16, 8 // n)
    return (load * lanes + r // n * 16 + d % 16) * 8 + group * n + r % n


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("gpu", ["h200-sxm", "cpu-avx2", "mi300x", "rx-9070-xt"])
def test_kv_chunks_hold_each_element_where_stated(gpu: str, dim: int, kv_dtype: str) -> None:
    options = Options(blocks=4, kv_dtype=kv_dtype)
    plan = make_plan(replace(load_spec("llama-3.2-1b"), head_dim=dim), load_profile(gpu), options)
    target, positions, fp8 = plan.target, 300, kv_dtype == "fp8"
    rng = np.random.default_rng(dim)
    raw = rng.integers(0, 0x7F, (3, plan.chunk_bytes)).astype(np.uint8)  # neither infinite nor NaN in either type
    keys, values = unpack_kv(plan, target, raw, positions)
    assert keys.shape == values.shape == (positions, dim)
    rows = 128 if target == "cpu" else 16  # of a tile
    for p in (0, 1, 7, 8, 9, 15, 16, 127, 128, 200, 299):
        chunk, tile, r = raw[p // 128], p % 128 // rows, p % rows
        part = chunk[tile * rows * plan.position_bytes :][: rows * plan.position_bytes]
        for d in (0, 1, 7, 8, 13, 16, dim - 1):
            key, value = (f(target, plan.profile.lanes, dim, p % 128, d) for f in (key_place, value_place))
            if fp8:
                order = [0, 1, 2, 3] if target == "cpu" else [0, 2, 1, 3]
                key, value = (i // 4 * 4 + order[i % 4] for i in (key, value))
                scales = part[2 * rows * dim :]
                at = (r % 8 * 4 + r // 8, r % 8 * 4 + 2 + r // 8) if target == "cuda" else (r, rows + r)
                assert keys[p, d] == DECODED[part[key]] * 2.0 ** (int(scales[at[0]]) - 127)
                assert values[p, d] == DECODED[part[rows * dim + value]] * 2.0 ** (int(scales[at[1]]) - 127)
            else:
                floats = to_float32(part.view(np.uint16), "bf16")
                assert keys[p, d] == floats[key]
                assert values[p, d] == floats[rows * dim + value]
    both = rng.normal(0, 1, (2, positions, dim)).astype(np.float32)
    for vectors, back in zip(both, unpack_kv(plan, target, pack_kv(plan, target, *both), positions), strict=True):
        assert np.array_equal(back, round_kv(vectors, kv_dtype))
    if not fp8:  # in FP8 a largest number that was rounded up to 256 has two spellings
        assert np.array_equal(pack_kv(plan, target, *unpack_kv(plan, target, raw, 384)), raw)


def test_numbers_of_an_fp8_cache_are_e4m3() -> None:
    """As ml_dtypes has them, of vectors of any size; to a sixteenth of each number, and nothing saturates."""
    codes = np.arange(256, dtype=np.uint8)
    e4m3 = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(DECODED[codes % 128 != 127], e4m3[codes % 128 != 127])
    rng = np.random.default_rng(0)
    x = (rng.normal(0, 1, (4000, 64)) * 2.0 ** rng.integers(-100, 60, (4000, 1))).astype(np.float32)
    codes, exponents = to_fp8(x)
    scaled = np.ldexp(x, 127 - exponents[:, None].astype(np.int32))
    assert np.array_equal(codes, scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    largest = np.abs(scaled).max(axis=1)
    assert largest.min() >= 128
    assert largest.max() < 256
    back = from_fp8(codes, exponents)
    assert (np.abs(back - x) <= np.abs(x) / 16 + np.abs(x).max(axis=1, keepdims=True) * 2.0**-17).all()
    assert not from_fp8(*to_fp8(np.zeros((1, 64), np.float32))).any()


def test_kv_of_more_positions_than_stored_is_refused() -> None:
    plan = plan_of(load_spec("llama-3.2-1b"), 4)
    with pytest.raises(ValueError, match="129 positions from 1 chunks"):
        unpack_kv(plan, "cuda", np.zeros((1, plan.chunk_bytes), np.uint8), 129)
