"""docs/targets.md is about the profiles and models that ship, and says what did not run."""

from __future__ import annotations

from matrix import AMD_COLUMNS, DOCUMENT, RAN_ON_HARDWARE, Cell, cuda_profiles, document, hip_profiles

from kogc.spec import list_specs


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_document_has_every_profile_and_model_without_spills() -> None:
    table = rows(DOCUMENT.read_text(encoding="utf-8"))
    profiles, models = [p.name for p in cuda_profiles()], list_specs()
    amd = table.index(list(AMD_COLUMNS))
    summary, detail = table[1 : 1 + len(profiles)], table[1 + len(profiles) : amd]
    assert [row[0] for row in summary] == profiles, "run `make matrix`"
    assert [(row[5], row[7]) for row in summary] == [(f"{len(models)} of {len(models)}", "none")] * len(profiles)
    assert [row[0] for row in summary if row[-1] == "hardware"] == list(RAN_ON_HARDWARE)
    assert detail[0] == ["model", *profiles]
    assert [row[0] for row in detail[1:]] == models, "run `make matrix`"
    profiles = [p.name for p in hip_profiles()]
    summary, detail = table[amd + 1 : amd + 1 + len(profiles)], table[amd + 1 + len(profiles) :]
    assert [row[0] for row in summary] == profiles, "run `make matrix`"
    assert {(row[8], row[10]) for row in summary} == {("none", "nothing: only compiled")}
    assert min(int(row[9]) for row in summary) >= 1
    assert detail[0] == ["model", *profiles]
    assert [row[0] for row in detail[1:]] == models, "run `make matrix`"
    refused = [(row[0], profiles[i]) for row in detail[1:] for i, cell in enumerate(row[1:]) if cell == "refused"]
    assert refused == [("qwen3-8b", "rx-9070-xt")]  # larger than its memory


def test_what_is_refused_or_spills_shows() -> None:
    cells = [Cell(m, p.name, "", 168, 0, 99 << 10, 6, 8192, 80) for p in cuda_profiles() for m in list_specs()]
    cells += [Cell(m, p.name, "", 200, 0, 48 << 10, 8, 8192, 256, 100, 1) for p in hip_profiles() for m in list_specs()]
    cells[0] = Cell(cells[0].model, cells[0].gpu, "plan: too large")
    cells[1] = Cell(cells[1].model, cells[1].gpu, "", 168, 12, 99 << 10, 6, 8192, 80)
    text = document(cells)
    assert f"- {cells[0].model} on {cells[0].gpu}: plan: too large" in text
    assert "spills 12 B" in text
