"""What a reader opens first is what kogc renders."""

from __future__ import annotations

import pytest
from golden import GENERATED, PAIRS, file_of, golden


@pytest.mark.parametrize(("model", "gpu", "blocks"), PAIRS)
def test_generated_source_is_current(model: str, gpu: str, blocks: int | None) -> None:
    file = file_of(model, gpu)
    found = file.read_text(encoding="utf-8") if file.is_file() else ""
    if found != golden(model, gpu, blocks).source:
        message = f"generated/{file.name} is not what kogc renders: run `make golden`, read the difference, commit it"
        pytest.fail(message, pytrace=False)


def test_nothing_else_is_generated() -> None:
    assert sorted(GENERATED.glob("*")) == sorted(file_of(model, gpu) for model, gpu, _ in PAIRS)
