//! Numbers for people.

use std::time::Duration;

/// Bytes in binary units: `517.0 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    let mut value = count;
    let mut rest = 0;
    let mut unit = "B";
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024 {
            break;
        }
        (rest, value, unit) = (value % 1024, value / 1024, next);
    }
    if unit == "B" { format!("{value} B") } else { format!("{value}.{} {unit}", rest * 10 / 1024) }
}

/// A length of time: `0.3 s`, `41 s`, `3 min 20 s`.
pub(crate) fn seconds(seconds: f64) -> String {
    let whole = Duration::from_secs_f64(seconds.max(0.0)).as_secs();
    if seconds < 9.95 {
        format!("{seconds:.1} s")
    } else if seconds < 119.5 {
        format!("{seconds:.0} s")
    } else {
        format!("{} min {} s", whole / 60, whole % 60)
    }
}

/// How long ago something was: `2 min ago`, `6 d ago`.
pub(crate) fn ago(age: Duration) -> String {
    format!("{} ago", kiln_bake::explain::span(age))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(4 << 30), "4.0 GiB");
        assert_eq!(seconds(0.26), "0.3 s");
        assert_eq!(seconds(41.4), "41 s");
        assert_eq!(seconds(200.0), "3 min 20 s");
        assert_eq!(ago(Duration::from_secs(600_000)), "6 d ago");
    }
}
