"""What a pipeline tells of kiln's JSON, for people: Markdown on standard output.

  summary.py bake EVENTS             the events of `kiln bake --json`
  summary.py publish RESULT          what `kiln publish --json` said
  summary.py references RESULT [REG] NAME:VERSION of each image of `kiln bake --result`,
                                     as it is at the registry REG (HOST/NAMESPACE), if one is named
"""

from __future__ import annotations

import json, sys
from pathlib import Path
from typing import Any, Iterable

Object = dict[str, Any]


def cell(text: Any) -> str:
    """One line that a table's cell can hold."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def table(heads: list[str], rows: Iterable[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else f"{int(value) // 60} min {int(value) % 60} s"


def image(baked: Object) -> list[str]:
    lines = [f"### {cell(baked['name'])}:{cell(baked['version'])}", ""]
    facts = [["digest", f"`{baked['digest']}`"], ["disk digest", f"`{baked['disk_digest']}`"], ["architecture", baked["arch"]], ["took", seconds(baked["seconds"])]]
    for artifact in baked.get("artifacts", []):
        facts.append([artifact.get("kind", "artifact"), f"`{artifact.get('reference') or artifact.get('id') or artifact.get('digest', '')}`"])
    lines += table(["", ""], facts) + [""]
    if baked["steps"]:
        rows = [[step["name"], "cached" if step["cached"] else seconds(step["seconds"]), f"`{step['key'][:12]}`"] for step in baked["steps"]]
        lines += table(["step", "took", "key"], rows) + [""]
    return lines


def outcome(test: Object) -> str:
    failed = [case for case in test["cases"] if case["outcome"] == "failed"]
    return f"**failed**: {len(failed)} of {len(test['cases'])}" if failed else "passed"


def took(test: Object) -> str:
    return "cached" if test.get("cached") else seconds(test["seconds"])


def bake(events: Iterable[str]) -> list[str]:
    """Of a stream that may have been cut: what came counts."""
    seen: list[Object] = []
    for line in events:
        try:
            seen.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    lines: list[str] = []
    for event in seen:
        if event["event"] == "baked":
            lines += image(event)
    tests = [event for event in seen if event["event"] == "tested"]
    if tests:
        lines += table(["test", "result", "took"], [[test["name"], outcome(test), took(test)] for test in tests]) + [""]
    warnings = [event["message"] for event in seen if event["event"] == "warning"]
    lines += [f"- warning: {cell(text)}" for text in warnings] + ([""] if warnings else [])
    done = next((event for event in seen if event["event"] == "done"), None)
    if done is None:
        return lines + ["**kiln did not end**: its last event is missing.", ""]
    if not done["ok"]:
        error = done["error"]
        step = f" in step `{error['step']}`" if error.get("step") else ""
        lines += [f"**Failed{step}** ({error['code']}): {cell(error['cause'])}", ""]
        if error.get("next"):
            lines += [f"Next: {cell(error['next'])}", ""]
    return lines


def publish(result: Object) -> list[str]:
    rows = [[result["reference"], ami["region"], f"`{ami['ami']}`", ami["arch"], "was there" if ami.get("existed") else "new"] for ami in result["amis"]]
    return table(["image", "region", "AMI", "architecture", ""], rows) + [""]


def references(result: Object, registry: str) -> list[str]:
    before = f"{registry}/" if registry else ""
    return [f"{before}{image['name']}:{image['version']}" for image in result["images"]]


def main(arguments: list[str]) -> int:
    match arguments:
        case ["bake", path]:
            lines = bake(Path(path).read_text().splitlines())
        case ["publish", path]:
            lines = publish(json.loads(Path(path).read_text()))
        case ["references", path, *registry] if len(registry) <= 1:
            lines = references(json.loads(Path(path).read_text()), registry[0] if registry else "")
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    print("\n".join(lines))
    return 0


sys.exit(main(sys.argv[1:]))
