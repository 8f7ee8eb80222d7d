//! Which of two versions is newer, by the rules of each package manager.

use std::cmp::Ordering;

/// Compares two runs of digits of any length.
fn numbers(a: &str, b: &str) -> Ordering {
    let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

/// Splits off what `is` holds for.
fn leading(text: &str, is: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(|c| !is(c)).unwrap_or(text.len()))
}

/// dpkg's, after deb-version(7): epoch, upstream version, revision; `~` sorts
/// before everything, even the end.
pub(crate) fn deb(a: &str, b: &str) -> Ordering {
    fn parts(version: &str) -> (&str, &str, &str) {
        let (epoch, rest) = version.split_once(':').unwrap_or(("0", version));
        let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, ""));
        (epoch, upstream, revision)
    }
    let (a, b) = (parts(a), parts(b));
    numbers(a.0, b.0).then_with(|| deb_part(a.1, b.1)).then_with(|| deb_part(a.2, b.2))
}

fn deb_part(mut a: &str, mut b: &str) -> Ordering {
    let order = |c: Option<char>| match c {
        Some('~') => -1,
        None => 0,
        Some(c) if c.is_ascii_alphabetic() => i64::from(u32::from(c)),
        Some(c) => i64::from(u32::from(c)) + 0x100,
    };
    while !a.is_empty() || !b.is_empty() {
        let ((x, rest_a), (y, rest_b)) = (leading(a, |c| !c.is_ascii_digit()), leading(b, |c| !c.is_ascii_digit()));
        let (mut x, mut y) = (x.chars(), y.chars());
        loop {
            let (c, d) = (x.next(), y.next());
            match order(c).cmp(&order(d)) {
                Ordering::Equal if c.is_none() && d.is_none() => break,
                Ordering::Equal => {}
                other => return other,
            }
        }
        let ((x, rest_a), (y, rest_b)) = (leading(rest_a, |c| c.is_ascii_digit()), leading(rest_b, |c| c.is_ascii_digit()));
        match numbers(x, y) {
            Ordering::Equal => (a, b) = (rest_a, rest_b),
            other => return other,
        }
    }
    Ordering::Equal
}

/// rpm's: epoch, version, release, each after `rpmvercmp`.
pub(crate) fn rpm(a: &str, b: &str) -> Ordering {
    fn parts(version: &str) -> (&str, &str, &str) {
        let (epoch, rest) = version.split_once(':').unwrap_or(("0", version));
        let (version, release) = rest.rsplit_once('-').unwrap_or((rest, ""));
        (epoch, version, release)
    }
    let (a, b) = (parts(a), parts(b));
    numbers(a.0, b.0).then_with(|| rpm_part(a.1, b.1)).then_with(|| rpm_part(a.2, b.2))
}

fn rpm_part(mut a: &str, mut b: &str) -> Ordering {
    let separator = |c: char| !c.is_ascii_alphanumeric() && c != '~' && c != '^';
    loop {
        (a, b) = (a.trim_start_matches(separator), b.trim_start_matches(separator));
        // `~` is older than the end, `^` newer than the end and older than anything else.
        for (mark, without) in [('~', Ordering::Greater), ('^', Ordering::Less)] {
            match (a.strip_prefix(mark), b.strip_prefix(mark)) {
                (None, None) => {}
                (Some(rest_a), Some(rest_b)) => return rpm_part(rest_a, rest_b),
                (None, Some(_)) => return if mark == '^' && !a.is_empty() { Ordering::Greater } else { without },
                (Some(_), None) => return if mark == '^' && !b.is_empty() { Ordering::Less } else { without.reverse() },
            }
        }
        if a.is_empty() || b.is_empty() {
            return a.len().cmp(&b.len());
        }
        let digits = a.starts_with(|c: char| c.is_ascii_digit());
        let is = |c: char| if digits { c.is_ascii_digit() } else { c.is_ascii_alphabetic() };
        let ((x, rest_a), (y, rest_b)) = (leading(a, is), leading(b, is));
        if y.is_empty() {
            // Digits are newer than letters.
            return if digits { Ordering::Greater } else { Ordering::Less };
        }
        match if digits { numbers(x, y) } else { x.cmp(y) } {
            Ordering::Equal => (a, b) = (rest_a, rest_b),
            other => return other,
        }
    }
}

/// apk's: numbers with points, a letter, suffixes such as `_rc1` and `_p2`, and
/// `-r` with the package's own revision.
pub(crate) fn apk(a: &str, b: &str) -> Ordering {
    fn revision(version: &str) -> (&str, &str) {
        match version.rsplit_once("-r") {
            Some((rest, revision)) if revision.bytes().all(|b| b.is_ascii_digit()) => (rest, revision),
            _ => (version, "0"),
        }
    }
    let ((a, revision_a), (b, revision_b)) = (revision(a), revision(b));
    apk_part(a, b).then_with(|| numbers(revision_a, revision_b))
}

fn apk_part(a: &str, b: &str) -> Ordering {
    fn parts(version: &str) -> (&str, &str, Vec<(i8, &str)>) {
        // A commit may follow: it says nothing of what is newer.
        let version = version.split('~').next().unwrap_or_default();
        let (numbers, rest) = leading(version, |c| c.is_ascii_digit() || c == '.');
        let (letter, rest) = leading(rest, |c| c.is_ascii_lowercase());
        let suffix = |text| {
            let (word, number) = leading(text, |c: char| c.is_ascii_lowercase());
            let known = ["alpha", "beta", "pre", "rc", "", "cvs", "svn", "git", "hg", "p"].iter().position(|s| *s == word);
            (known.and_then(|at| i8::try_from(at).ok()).map_or(6, |at| at - 4), number)
        };
        (numbers, letter, rest.split('_').skip(1).map(suffix).collect())
    }
    let (a, b) = (parts(a), parts(b));
    let (mut x, mut y) = (a.0.split('.'), b.0.split('.'));
    let mut first = true;
    loop {
        let order = match (x.next(), y.next()) {
            (None, None) => break,
            (None, Some(_)) => Ordering::Less,
            (Some(_), None) => Ordering::Greater,
            // With a zero in front they are fractions.
            (Some(x), Some(y)) if !first && (x.starts_with('0') || y.starts_with('0')) => x.cmp(y),
            (Some(x), Some(y)) => numbers(x, y),
        };
        if order != Ordering::Equal {
            return order;
        }
        first = false;
    }
    let suffixes = || {
        for at in 0..a.2.len().max(b.2.len()) {
            let end = (0, "");
            let (x, y) = (a.2.get(at).unwrap_or(&end), b.2.get(at).unwrap_or(&end));
            let order = x.0.cmp(&y.0).then_with(|| numbers(x.1, y.1));
            if order != Ordering::Equal {
                return order;
            }
        }
        Ordering::Equal
    };
    a.1.cmp(b.1).then_with(suffixes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ascending(compare: fn(&str, &str) -> Ordering, versions: &[&str]) {
        for (i, a) in versions.iter().enumerate() {
            for (j, b) in versions.iter().enumerate() {
                assert_eq!(compare(a, b), i.cmp(&j), "{a} and {b}");
            }
        }
    }

    #[test]
    fn of_dpkg() {
        ascending(
            deb,
            &[
                "1.0~~",
                "1.0~~a",
                "1.0~",
                "1.0",
                "1.0-1~bpo1",
                "1.0-1",
                "1.0-1+b1",
                "1.0-1.1",
                "1.0a",
                "1.0+",
                "1.2",
                "1.10",
                "1:0.1",
                "2:0",
            ],
        );
        assert_eq!(deb("1.0", "1.0-0"), Ordering::Equal);
        assert_eq!(deb("0:1.00", "1.0"), Ordering::Equal);
        let long = "9".repeat(100);
        assert_eq!(deb(&long, "1"), Ordering::Greater);
    }

    #[test]
    fn of_rpm() {
        ascending(rpm, &["1.0~rc1-1", "1.0-1", "1.0^git1-1", "1.0.1-1", "1.0.2-0.9", "1.0.2-1.fc39", "1.0.2-2", "1.10-1", "1:0.1-1"]);
        ascending(rpm, &["5.5p1", "5.5p2", "5.5p10", "6.a", "6.0", "10xyz", "10.1xyz"]);
        assert_eq!(rpm("2_0-1", "2.0-1"), Ordering::Equal);
        assert_eq!(rpm("0:1-1", "1-1"), Ordering::Equal);
    }

    #[test]
    fn of_apk() {
        ascending(
            apk,
            &[
                "0.9-r0",
                "1.0_alpha1-r0",
                "1.0_alpha2-r0",
                "1.0_beta-r0",
                "1.0_pre3-r0",
                "1.0_rc1-r0",
                "1.0_rc1-r1",
                "1.0-r0",
                "1.0-r1",
                "1.0-r10",
                "1.0_git20230101-r0",
                "1.0_p1-r0",
                "1.0b-r0",
                "1.0.1-r0",
                "1.05-r0",
                "1.1-r0",
                "1.2-r0",
                "1.10-r0",
                "2-r0",
            ],
        );
    }

    /// What dpkg itself says, where it is installed.
    #[test]
    fn as_dpkg_has_it() {
        let Some(dpkg) = crate::testing::find_program("dpkg") else { return };
        let versions =
            ["1.0", "1.0-1", "1.0~rc1-1", "1:0.9", "1.0+dfsg-1", "1.0-1+deb12u1", "1.0-1~deb12u1", "1.0a-1", "1.00-1", "12.2.0-14"];
        for a in versions {
            for b in versions {
                let says = |operator: &str| {
                    std::process::Command::new(&dpkg)
                        .args(["--compare-versions", a, operator, b])
                        .status()
                        .is_ok_and(|status| status.success())
                };
                let theirs = if says("lt") {
                    Ordering::Less
                } else if says("gt") {
                    Ordering::Greater
                } else {
                    Ordering::Equal
                };
                assert_eq!(deb(a, b), theirs, "{a} and {b}");
            }
        }
    }
}
