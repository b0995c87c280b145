"""`kogc doctor`: what this machine has, and what kogc can do with it."""

from __future__ import annotations

from typing import Any

import click


@click.command("doctor", short_help="Look at this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> int:
    """Look at this machine: packages, compilers, GPUs, CPU features, caches. Exit status 1 if nothing can be built."""
    from ..doctor import examine, missing_packages
    from .output import emit_json

    report = examine()
    if as_json:
        emit_json(report)
    else:
        for key, value in _lines(report, missing_packages(report)):
            click.echo(f"{key + ':':<12}{value}")
    return 0 if report["builds"] and not missing_packages(report) else 1


def _lines(report: dict[str, Any], missing: list[str]) -> list[tuple[str, str]]:
    from .output import size

    packages = [f"{name} {version}" for name, version in report["packages"].items() if version]
    cuda, cpu, cache = report["cuda"], report["cpu"], report["cache"]
    lines = [
        ("kogc", f"{report['kogc']} (Python {report['python']}, {report['platform']})"),
        ("packages", ", ".join(packages)),
        *[("missing", name) for name in missing],
        ("nvrtc", report["nvrtc"] or "not found: install nvidia-cuda-nvrtc to build for CUDA"),
        ("driver", f"CUDA {cuda['driver']}" if cuda["driver"] else "none: CUDA artifacts can be built here, not run"),
    ]
    for device in cuda["devices"]:
        capability = ".".join(map(str, device["capability"]))
        facts = f"compute capability {capability}, {device['sms']} SMs, {size(device['memory_bytes'])}"
        profile = device["profile"] or "no profile describes it"
        lines.append((f"GPU {device['index']}", f"{device['name']} ({facts}): {profile}"))
    lines.append(("AMD", report["hip"]["compiler"] or "no compiler: install the extra kogc[hip] to build for AMD GPUs"))
    for device in report["hip"]["devices"]:
        facts = f"{device['arch']}, {device['units']} units, {size(device['memory_bytes'])}"
        profile = device["profile"] or "no profile describes it"
        lines.append((f"GPU {device['index']}", f"{device['name']} ({facts}): {profile}"))
    for compiler in report["compilers"]:
        lines.append(("C++", f"{compiler['name']}: {compiler['version']}"))
    lines.append(("C++ used", report["cxx"] or "none: install g++ or clang++, or the extra kogc[cpu]"))
    writable = "" if cache["writable"] else ", not writable: every build compiles anew"
    return [
        *lines,
        ("CPU", f"{cpu['machine']}, {cpu['cores']} cores, profile {cpu['profile']}"),
        ("features", " ".join(cpu["features"]) or "unknown"),
        ("cache", f"{cache['dir']} ({cache['entries']} entries, {size(cache['bytes'])}{writable})"),
        ("hub cache", report["hub_cache"]),
        ("can build", ", ".join(report["builds"]) or "nothing"),
        ("can run", ", ".join(filter(None, report["runs"])) or "nothing"),
    ]
