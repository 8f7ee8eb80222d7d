"""Runs ci/github or ci/gitlab here, as far as their runners would: the files are
parsed, expressions and rules evaluated, and the commands run.

  run.py github|gitlab TOP FOLDER CONTEXT

TOP is the repository with ci/, FOLDER the checkout that is baked, CONTEXT a JSON
object: what the runner knows (`github`, `secrets`, `vars`, or for GitLab the
variables), `environment` for every command, and `replace`, pairs of texts: the
addresses of this test in the place of those in the files.

Says which steps or jobs ran, one a line; ends with the status of the first that
failed, after those that run always."""

from __future__ import annotations

import json, os, re, subprocess, sys
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]


def load(path: Path) -> Object:
    loaded = yaml.safe_load(path.read_text())
    assert isinstance(loaded, dict), path
    return loaded


def evaluate(expression: str, context: Object) -> Any:
    """As much of GitHub's expressions as the files use; a name it does not know is an error."""
    tokens = re.findall(r"'(?:[^']|'')*'|&&|\|\||==|!=|[(),!]|[A-Za-z_][\w.-]*|\S", expression)
    out = []
    for at, token in enumerate(tokens):
        if token.startswith("'"):
            out.append(repr(token[1:-1].replace("''", "'")))
        elif token in ("&&", "||", "!"):
            out.append({"&&": " and ", "||": " or ", "!": " not "}[token])
        elif token in ("==", "!=", "(", ")", ","):
            out.append(token)
        elif re.match(r"[A-Za-z_]", token):
            out.append(token if tokens[at + 1 : at + 2] == ["("] else f"look({token!r})")
        else:
            raise SyntaxError(f"{token} in {expression}")

    def look(path: str) -> Any:
        value: Any = context
        for part in path.split("."):
            value = value[part]
        return value

    functions = {"look": look, "format": lambda text, *values: text.format(*values), "always": lambda: True}
    return eval("".join(out), {"__builtins__": {}}, functions)


def expand(text: str, context: Object) -> str:
    def put(match: re.Match[str]) -> str:
        value = evaluate(match[1], context)
        return "" if value in (None, False) else str(value)

    text = re.sub(r"\$\{\{\s*(.*?)\s*\}\}", put, text)
    for old, new in context["replace"]:
        text = text.replace(old, new)
    return text


def bash(script: str, folder: Path, environment: Object) -> int:
    everything = {**os.environ, **environment}
    return subprocess.run(["bash", "-e", "-o", "pipefail", "-c", script], cwd=folder, env=everything, stdin=subprocess.DEVNULL).returncode


def pairs(path: Path) -> Object:
    """What a step has written into $GITHUB_OUTPUT or $GITHUB_ENV."""
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line) if path.exists() else {}


class Github:
    def __init__(self, top: Path, folder: Path, context: Object) -> None:
        self.top, self.folder, self.context, self.status = top, folder, context, 0
        files = Path(context["runner"]["temp"])
        files.mkdir(parents=True, exist_ok=True)
        self.files = {name: files / name.lower() for name in ("GITHUB_ENV", "GITHUB_STEP_SUMMARY")}
        self.output = files / "output"

    def steps(self, steps: list[Object], context: Object) -> None:
        for step in steps:
            condition = str(step.get("if", "success()"))
            if condition == "success()" or "always()" not in condition:
                if self.status != 0:
                    continue
                if condition != "success()" and not evaluate(condition, context):
                    continue
            uses = step.get("uses", "")
            if uses.startswith("kiln-images/kiln/ci/github@"):
                action = load(self.top / "ci/github/action.yml")
                given = {name: expand(str(value), context) for name, value in step["with"].items()}
                unknown = set(given) - set(action["inputs"])
                assert not unknown, f"the action has no input {unknown}"
                inputs = {name: given.get(name, spec.get("default", "")) for name, spec in action["inputs"].items()}
                assert action["runs"]["using"] == "composite"
                self.steps(action["runs"]["steps"], {**context, "inputs": inputs, "steps": {}})
            elif uses:
                assert uses.startswith("actions/checkout@"), f"{uses} cannot be run here"
            else:
                self.run(step, context)

    def run(self, step: Object, context: Object) -> None:
        self.output.unlink(missing_ok=True)
        environment = {**context["environment"], **pairs(self.files["GITHUB_ENV"])}
        environment |= {name: expand(str(value), context) for name, value in step.get("env", {}).items()}
        environment |= {name: str(path) for name, path in self.files.items()}
        environment |= {"GITHUB_OUTPUT": str(self.output), "GITHUB_ACTION_PATH": str(self.top / "ci/github"), "GITHUB_ACTOR": "test"}
        environment["GITHUB_REF_NAME"] = context["github"]["ref_name"]
        print(f"step: {step['name']}", flush=True)
        status = bash(expand(step["run"], context), self.folder, environment)
        if "id" in step:
            context["steps"][step["id"]] = {"outputs": pairs(self.output)}
        self.status = self.status or status


def github(top: Path, folder: Path, context: Object) -> int:
    workflow = load(top / "ci/github/workflow.yml")
    # YAML takes `on` for a truth value.
    assert "push" in workflow[True] and workflow["permissions"]["id-token"] == "write"
    runner = Github(top, folder, context)
    for job in workflow["jobs"].values():
        runner.steps(job["steps"], context)
    return runner.status


def rule(text: str, variables: Object) -> bool:
    """`$A || $B == $C`: what GitLab's rules use here."""

    def value(term: str) -> str:
        return variables.get(term[1:], "") if term.startswith("$") else term.strip("\"'")

    def holds(part: str) -> bool:
        sides = [side.strip() for side in part.split("==")]
        return value(sides[0]) == value(sides[1]) if len(sides) == 2 else bool(value(sides[0]))

    return any(all(holds(part.strip()) for part in one.split("&&")) for one in text.split("||"))


def gitlab(top: Path, folder: Path, context: Object) -> int:
    pipeline = load(top / "ci/gitlab/kiln.gitlab-ci.yml")
    variables: Object = dict(context["variables"])
    for name, text in pipeline["variables"].items():
        text = re.sub(r"\$([A-Z_]+)", lambda match: str(variables[match[1]]), str(text))
        for old, new in context["replace"]:
            text = text.replace(old, new)
        variables[name] = text
    jobs = {name: job for name, job in pipeline.items() if isinstance(job, dict) and "stage" in job}
    assert {job["stage"] for job in jobs.values()} == set(pipeline["stages"])
    for stage in pipeline["stages"]:
        for name, job in jobs.items():
            if job["stage"] != stage or not any(rule(one["if"], variables) for one in job.get("rules", [{"if": "yes"}])):
                continue
            if name in context.get("leave_out", []):
                continue
            job = {**pipeline[job["extends"]], **job}
            environment = {**context["environment"], **{key: str(value) for key, value in variables.items()}}
            for token in job.get("id_tokens", {}):
                environment[token] = context["id_token"]
            print(f"job: {name}", flush=True)
            status = bash("\n".join(job["before_script"] + job["script"]), folder, environment)
            after = bash("\n".join(job["after_script"]), folder, environment)
            if status or after:
                return status or after
    return 0


if __name__ == "__main__":
    kind, top, folder, context = sys.argv[1:]
    run = {"github": github, "gitlab": gitlab}[kind]
    sys.exit(run(Path(top), Path(folder), json.loads(Path(context).read_text())))
