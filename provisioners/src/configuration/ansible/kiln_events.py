# Tells what was done, task by task: one JSON object per line, into the file
# that KILN_EVENTS names. In check mode it also tells what would change; of a
# task that cannot be asked that (a command, for example) what counts is what it
# said in the run before, which KILN_EVENTS_BEFORE names.
from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = """
    name: kiln_events
    type: notification
    short_description: tells kiln what was done
    description:
      - Writes one JSON object per line into the file that KILN_EVENTS names.
"""

import json
import os

from ansible.plugins.callback import CallbackBase

LINES = 10


def of_all(data):
    """The results of the items of a loop; without one, the result itself."""
    items = data.get("results")
    if isinstance(items, list) and items and all(isinstance(item, dict) for item in items):
        return items
    return [data]


def is_hidden(data):
    """Whether Ansible withholds it (no_log)."""
    return any("censored" in one for one in [data] + of_all(data))


def place(data):
    """What of the machine a result is about: a path, or a name."""
    arguments = (data.get("invocation") or {}).get("module_args") or {}
    for key in ("dest", "path", "name"):
        for source in (data, arguments):
            value = source.get(key)
            if isinstance(value, list):
                value = ", ".join(str(part) for part in value)
            if isinstance(value, str) and value:
                return value
    return None


def said(data):
    """Why it failed, and the end of what it printed."""
    message = data.get("msg") or data.get("reason") or data.get("exception") or "it does not say why"
    printed = []
    for key in ("module_stderr", "module_stdout", "stderr", "stdout"):
        printed += str(data.get(key) or "").strip().splitlines()[-LINES:]
    return str(message).strip(), printed[-LINES:]


def cannot_be_asked(task, data):
    """Whether what was skipped was so since check mode is not for it."""
    if "censored" in data:
        return not task.when
    message = str(data.get("msg") or "")
    return "skip_reason" not in data and (not message or "check mode" in message.lower())


class CallbackModule(CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "kiln_events"

    def __init__(self, *arguments, **named):
        super(CallbackModule, self).__init__(*arguments, **named)
        self._file = os.environ["KILN_EVENTS"]
        self._changed_before = set()
        self._check = "KILN_EVENTS_BEFORE" in os.environ
        if self._check:
            with open(os.environ["KILN_EVENTS_BEFORE"], encoding="utf-8") as lines:
                before = [json.loads(line) for line in lines]
            self._changed_before = set(event["id"] for event in before if event["changed"])

    def _tell(self, result, outcome):
        task, data, host = result._task, result._result, result._host.get_name()
        hidden = is_hidden(data)
        resource = "%s (%s) on %s" % (task.get_name(), task.action, host)
        event = {"outcome": outcome, "task": resource, "id": "%s %s" % (task.get_path(), host), "changed": bool(data.get("changed"))}
        if outcome in ("failed", "unreachable"):
            bad = [one for one in of_all(data) if one.get("failed") or one.get("unreachable")] or [data]
            told = [said(one) for one in bad]
            if hidden:
                told = [("its output is hidden (no_log)", [])]
            event["message"] = "; ".join(message for message, _ in told)
            event["printed"] = [line for _, lines in told for line in lines][-LINES:]
        if self._check:
            event["would_change"] = self._would_change(task, data, event, hidden)
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def _would_change(self, task, data, event, hidden):
        found, items = [], of_all(data)
        for one in items:
            # Of a result as a whole, what kind of event it is says this.
            skipped = one.get("skipped") if items[0] is not data else event["outcome"] == "skipped"
            if one.get("changed"):
                where = None if hidden else place(one)
                found.append(event["task"] + (": " + where if where else ""))
            elif skipped and event["id"] in self._changed_before and cannot_be_asked(task, one):
                found.append(event["task"] + ": it would run again")
        if not found and data.get("changed"):
            found.append(event["task"])
        return sorted(set(found), key=found.index)

    def v2_runner_on_ok(self, result):
        self._tell(result, "ok")

    def v2_runner_on_failed(self, result, ignore_errors=False):
        self._tell(result, "ignored" if ignore_errors else "failed")

    def v2_runner_on_unreachable(self, result):
        self._tell(result, "unreachable")

    def v2_runner_on_skipped(self, result):
        self._tell(result, "skipped")
