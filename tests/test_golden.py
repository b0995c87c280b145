"""What a reader opens first is what kogc renders."""

from __future__ import annotations

import pytest
from golden import GENERATED, PAIRS, file_of, golden


@pytest.mark.parametrize(("model", "gpu", "blocks"), PAIRS)
def test_generated_source_is_current(model: str, gpu: str, blocks: int | None) -> None:
    assert file_of(model, gpu).read_text(encoding="utf-8") == golden(model, gpu, blocks).source, "run `make golden`"


def test_nothing_else_is_generated() -> None:
    assert sorted(GENERATED.iterdir()) == sorted(file_of(model, gpu) for model, gpu, _ in PAIRS)
