"""What became of each state, in one line each: outcome, function, id, comment.

The fields are separated by tabs, which people read as columns. What failed goes
to standard error. Neither a diff nor the output of a command that worked is
shown: secrets may be in them.
"""

import sys


def _plain(text):
    return " ".join(str(text).split())


def _outcome(state):
    if state.get("result") is None:
        return "would change"
    if not state["result"]:
        return "not run" if str(state.get("comment", "")).startswith("One or more requisite failed") else "failed"
    return "changed" if state.get("changes") else "ok"


def _comment(state, outcome):
    comment, changes = _plain(state.get("comment", "")), state.get("changes")
    if outcome == "failed" and isinstance(changes, dict) and "retcode" in changes:
        said = (str(changes.get("stderr") or "").strip() or str(changes.get("stdout") or "").strip()).splitlines()[-1:]
        comment = ": ".join([f"{comment}, exit status {changes['retcode']}"] + [_plain(line) for line in said])
    return comment


def output(data, **_):
    lines, count = [], {}
    for states in data.values():
        if not isinstance(states, dict):
            # What could not even be read.
            for line in states if isinstance(states, list) else [states]:
                sys.stderr.write(f"failed\t{_plain(line)}\n")
            continue
        for tag, state in sorted(states.items(), key=lambda each: each[1].get("__run_num__", 0)):
            parts = tag.split("_|-")
            outcome = _outcome(state)
            count[outcome] = count.get(outcome, 0) + 1
            name = _plain(state.get("__id__", parts[1] if len(parts) > 1 else tag))
            line = "\t".join([outcome, f"{parts[0]}.{parts[-1]}", name, _comment(state, outcome)])
            if outcome == "failed":
                sys.stderr.write(line + "\n")
            else:
                lines.append(line)
    lines.append("states\t" + (", ".join(f"{number} {outcome}" for outcome, number in count.items()) or "none"))
    sys.stderr.flush()
    return "\n".join(lines)
