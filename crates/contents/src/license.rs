//! Licences as packages declare them, and whether that is an expression that
//! bills of materials take.
//!
//! SPDX's list has some seven hundred ids and grows. Those here are the ones
//! that distributions' packages mostly declare; a declaration with any other
//! word is kept as it is, under a name of its own, which is always valid.

/// Ids of SPDX's list that are recognised.
const KNOWN: &[&str] = &[
    "0BSD",
    "AFL-2.1",
    "AGPL-3.0-only",
    "AGPL-3.0-or-later",
    "Apache-1.1",
    "Apache-2.0",
    "Artistic-1.0-Perl",
    "Artistic-2.0",
    "BSD-1-Clause",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSD-4-Clause",
    "BSL-1.0",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC-BY-SA-3.0",
    "CC-BY-SA-4.0",
    "CC0-1.0",
    "CDDL-1.0",
    "EPL-1.0",
    "EPL-2.0",
    "FSFAP",
    "FTL",
    "GFDL-1.1-or-later",
    "GFDL-1.2-or-later",
    "GFDL-1.3-or-later",
    "GPL-1.0-only",
    "GPL-1.0-or-later",
    "GPL-2.0-only",
    "GPL-2.0-or-later",
    "GPL-3.0-only",
    "GPL-3.0-or-later",
    "HPND",
    "ICU",
    "IJG",
    "ISC",
    "LGPL-2.0-only",
    "LGPL-2.0-or-later",
    "LGPL-2.1-only",
    "LGPL-2.1-or-later",
    "LGPL-3.0-only",
    "LGPL-3.0-or-later",
    "MIT",
    "MIT-0",
    "MPL-1.1",
    "MPL-2.0",
    "MS-PL",
    "NCSA",
    "OFL-1.1",
    "OLDAP-2.8",
    "OpenSSL",
    "PHP-3.01",
    "PSF-2.0",
    "PostgreSQL",
    "Python-2.0",
    "Ruby",
    "SISSL",
    "Sleepycat",
    "TCL",
    "Unicode-3.0",
    "Unlicense",
    "UPL-1.0",
    "Vim",
    "W3C",
    "WTFPL",
    "X11",
    "Zlib",
    "ZPL-2.1",
    "blessing",
    "bzip2-1.0.6",
    "curl",
    "libpng-2.0",
    "zlib-acknowledgement",
];

/// Exceptions that may follow `WITH`.
const EXCEPTIONS: &[&str] = &[
    "Autoconf-exception-3.0",
    "Bison-exception-2.2",
    "Classpath-exception-2.0",
    "GCC-exception-3.1",
    "LLVM-exception",
    "Linux-syscall-note",
    "OpenSSL-exception",
    "cryptsetup-OpenSSL-exception",
];

/// Most bytes of an expression; what is longer is kept as it is.
const LIMIT: usize = 2000;

/// Whether `text` is a license expression made of known ids.
pub(crate) fn is_expression(text: &str) -> bool {
    if text.len() > LIMIT {
        return false;
    }
    let spaced = text.replace('(', " ( ").replace(')', " ) ");
    let mut depth = 0_usize;
    let mut operand_next = true;
    let mut words = spaced.split_whitespace().peekable();
    while let Some(word) = words.next() {
        match (word, operand_next) {
            ("(", true) => depth += 1,
            (")", false) if depth > 0 => depth -= 1,
            ("AND" | "OR", false) => operand_next = true,
            (id, true) if KNOWN.contains(&id) => {
                operand_next = false;
                if words.next_if_eq(&"WITH").is_some() && !words.next().is_some_and(|exception| EXCEPTIONS.contains(&exception)) {
                    return false;
                }
            }
            _ => return false,
        }
    }
    !operand_next && depth == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions() {
        for good in ["MIT", "GPL-2.0-or-later AND (MIT OR BSD-3-Clause)", "GPL-3.0-or-later WITH GCC-exception-3.1 AND MIT", "((ISC))"] {
            assert!(is_expression(good), "{good}");
        }
        for bad in
            ["", "GPL", "GPLv2+ and MIT", "MIT AND", "AND MIT", "(MIT", "MIT)", "MIT MIT", "MIT WITH", "MIT WITH x", "()", "MIT or ISC"]
        {
            assert!(!is_expression(bad), "{bad}");
        }
    }
}
