//! Where a bash script failed: what is recorded in the guest, and what is made
//! of it here.
//!
//! `BASH_ENV` names a file that bash reads before a script. It sets an `ERR`
//! trap (inherited by functions and subshells, `set -E`) and a function in
//! place of `exit`, which fires no such trap; an `EXIT` trap would be the
//! script's own to set. The script stays as it is, so that its line numbers
//! are the user's.

use kiln_model::guest::quote;

/// How many lines of a command are shown.
const SHOWN: usize = 6;

/// What `BASH_ENV` holds. Records go to `file`, one per line: status, depth of
/// subshells, line, and the command in one line.
pub(crate) fn prelude(file: &str) -> String {
    let file = quote(file);
    // The substitution hands on `$?`, since `exit` without a number means it
    // (and something else in a trap, which `builtin exit` knows).
    format!(
        r#"unset BASH_ENV
trap '{{ printf "%s %s %s %s\n" "$?" "$BASH_SUBSHELL" "$LINENO" "${{BASH_COMMAND//[[:cntrl:]]/ }}" >> {file}; }} 2>/dev/null || :' ERR
exit() {{
  builtin exit "$@" $(s=$?; {{ printf '%s %s %s exit\n' "${{1-$s}}" "$((BASH_SUBSHELL - 1))" "${{BASH_LINENO[0]}}" >> {file}; }} 2>/dev/null; builtin exit "$s")
}}
"#
    )
}

/// One record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    status: u32,
    depth: u32,
    line: usize,
    command: String,
}

impl Record {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(4, ' ');
        let mut number = || parts.next()?.parse::<u32>().ok();
        let (status, depth, line) = (number()?, number()?, number()? as usize);
        Some(Self { status, depth, line, command: parts.next().unwrap_or_default().to_owned() })
    }
}

/// The place in the script that made it end with `status`: a line number and
/// the command. `complaint` is the last line of standard error in which bash
/// names the script, for what fires no trap (an unset variable, a syntax
/// error).
pub(crate) fn place(script: &str, status: u32, records: &[Record], complaint: Option<usize>) -> Option<(usize, String)> {
    let lines: Vec<&str> = script.lines().collect();
    // `exit` in an `EXIT` trap carries on with the status there was.
    let end = records.iter().rposition(|record| record.command != "exit" || record.status == status).map_or(0, |at| at + 1);
    let found = match records[..end].split_last() {
        Some((last, before)) if last.depth == 0 && last.status == status => {
            let first = begin(&lines, last);
            // A subshell, a substitution or a function in it may have recorded
            // the command itself, just before.
            let inner = before.last().filter(|inner| inner.depth > 0 && inner.status == status);
            let inner = inner.map(|inner| begin(&lines, inner)).filter(|line| (first..=last.line).contains(line));
            inner.unwrap_or(first)
        }
        _ => complaint?,
    };
    (found >= 1 && found <= lines.len()).then(|| (found, command(&lines, found)))
}

/// The line on which a recorded command begins. bash counts from where its
/// parser stood, which for a command of several lines may be below.
fn begin(lines: &[&str], record: &Record) -> usize {
    let word = record.command.split_whitespace().next().unwrap_or_default();
    let mut line = record.line;
    let holds = |line: usize| lines.get(line.wrapping_sub(1)).is_some_and(|text| text.contains(word));
    if !word.is_empty() && !holds(line) {
        line = (line.saturating_sub(20).max(1)..line).rev().find(|above| holds(*above)).unwrap_or(line);
    }
    while line > 1 && lines.get(line - 2).is_some_and(|above| continues(above)) {
        line -= 1;
    }
    line
}

/// Whether a command goes on in the next line.
fn continues(line: &str) -> bool {
    let line = line.trim_end();
    !line.trim_start().starts_with('#') && ["\\", "|", "&&", "|&"].iter().any(|end| line.ends_with(end))
}

/// The command that begins on a line, as it was written.
fn command(lines: &[&str], first: usize) -> String {
    let mut last = first;
    while last < lines.len() && last < first + SHOWN - 1 && continues(lines[last - 1]) {
        last += 1;
    }
    let shown: Vec<&str> = lines[first - 1..last].iter().map(|line| line.trim_end()).collect();
    shown.join("\n").trim_start().to_owned()
}

/// The line number in what bash says of its script: `PATH: line N: …`.
pub(crate) fn complaint(line: &str, path: &str) -> Option<usize> {
    line.strip_prefix(path)?.strip_prefix(": line ")?.split(':').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a script under a real bash as the guest would.
    fn fails(script: &str) -> (u32, Option<(usize, String)>) {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        std::fs::write(at("script"), script).unwrap();
        std::fs::write(at("prelude"), prelude(&at("trace"))).unwrap();
        let output =
            std::process::Command::new("bash").args(["-Eeuo", "pipefail", &at("script")]).env("BASH_ENV", at("prelude")).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let said = stderr.lines().rev().find_map(|line| complaint(line, &at("script")));
        let trace = std::fs::read_to_string(at("trace")).unwrap_or_default();
        let records: Vec<_> = trace.lines().filter_map(Record::parse).collect();
        let status = output.status.code().unwrap_or(137) as u32;
        (status, place(script, status, &records, said))
    }

    #[test]
    fn the_failing_line_is_found() {
        let cases: &[(&str, u32, usize, &str)] = &[
            ("true\nfalse\ntrue", 1, 2, "false"),
            ("true\n\n  no-such-command -x", 127, 3, "no-such-command -x"),
            // Over several lines.
            ("true\nls \\\n  /no/such \\\n  /nor/this", 2, 2, "ls \\\n  /no/such \\\n  /nor/this"),
            ("true\nls /no/such \\\n  /nor/this", 2, 2, "ls /no/such \\\n  /nor/this"),
            ("cat <<X > /no/such/file\nbody\nX\n", 1, 1, "cat <<X > /no/such/file"),
            // Pipes.
            ("true\necho hi |\n  grep nothing |\n  cat\n", 1, 2, "echo hi |\n  grep nothing |\n  cat"),
            ("true\nfalse | cat", 1, 2, "false | cat"),
            // Functions, loops, subshells, substitutions.
            ("f() {\n  true\n  false\n}\ntrue\nf\n", 1, 3, "false"),
            ("for i in 1 2; do\n  test $i = 1\ndone", 1, 2, "test $i = 1"),
            ("true\n(\n  true\n  ls /no/such\n)\n", 2, 4, "ls /no/such"),
            ("f() {\n  false\n}\n( f )\n", 1, 4, "( f )"),
            ("true\nx=$(ls /no/such)\necho $x", 2, 2, "x=$(ls /no/such)"),
            ("x=$(false; echo hi)\ntrue\n[ 1 = 2 ]", 1, 3, "[ 1 = 2 ]"),
            ("if true; then\n  true && {\n    false\n  }\nfi", 1, 3, "false"),
            ("false || true\ntrue\nfalse", 1, 3, "false"),
            // Without a trap.
            ("true\nexit 3\n", 3, 2, "exit 3"),
            ("f() {\n  exit 5\n}\nf", 5, 2, "exit 5"),
            ("trap 'true' EXIT\ntrue\nexit 6", 6, 3, "exit 6"),
            ("trap 'true; exit' EXIT\ntrue\nfalse", 1, 3, "false"),
            ("( exit 4 )", 4, 1, "( exit 4 )"),
            ("true\necho $NOT_SET", 1, 2, "echo $NOT_SET"),
            ("true\nif then\n", 2, 2, "if then"),
            // Signals.
            ("true\nsh -c 'kill -KILL $$'", 137, 2, "sh -c 'kill -KILL $$'"),
        ];
        for (script, status, line, text) in cases {
            assert_eq!(fails(script), (*status, Some((*line, (*text).to_owned()))), "{script}");
        }
        assert_eq!(fails("kill -KILL $$"), (137, None));
        assert_eq!(fails("exit 0").0, 0);
        assert_eq!(fails("true\nexit").0, 0);
        assert_eq!(fails("set +e\nfalse\nexit").0, 1);
    }

    #[test]
    fn nothing_leaks_into_other_shells() {
        let (status, _) = fails("bash -c 'false; true'\nbash -c 'exit 0'\n[ -z \"${BASH_ENV-}\" ]");
        assert_eq!(status, 0);
    }
}
