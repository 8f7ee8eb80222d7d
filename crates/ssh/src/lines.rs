//! Lines out of a stream of bytes.

/// A line longer than this many bytes is given in pieces, so that a guest that
/// never ends its line cannot fill our memory.
const LONGEST: usize = 64 * 1024;

/// Splits one stream into lines: lossy UTF-8, without their ends. What a lone
/// carriage return overwrites on a terminal (progress bars) is dropped: the
/// line is what would be seen there when it ends.
#[derive(Default)]
pub(crate) struct Lines {
    buffer: Vec<u8>,
    returned: bool,
}

impl Lines {
    /// Takes bytes; gives every line that they end.
    pub(crate) fn push(&mut self, bytes: &[u8], mut on_line: impl FnMut(&str)) {
        let mut rest = bytes;
        while let Some(&first) = rest.first() {
            match first {
                b'\n' => {
                    self.give(self.buffer.len(), &mut on_line);
                    self.returned = false;
                    rest = &rest[1..];
                }
                b'\r' => {
                    self.returned = true;
                    rest = &rest[1..];
                }
                _ => {
                    if std::mem::take(&mut self.returned) {
                        self.buffer.clear();
                    }
                    let end = rest.iter().position(|b| matches!(b, b'\n' | b'\r')).unwrap_or(rest.len());
                    let end = end.min(LONGEST - self.buffer.len());
                    self.buffer.extend_from_slice(&rest[..end]);
                    rest = &rest[end..];
                    if self.buffer.len() == LONGEST {
                        self.give(whole_characters(&self.buffer), &mut on_line);
                    }
                }
            }
        }
    }

    /// The stream has ended: gives the last line, if it was not ended.
    pub(crate) fn finish(&mut self, mut on_line: impl FnMut(&str)) {
        if !self.buffer.is_empty() {
            self.give(self.buffer.len(), &mut on_line);
        }
    }

    fn give(&mut self, end: usize, on_line: &mut impl FnMut(&str)) {
        on_line(&String::from_utf8_lossy(&self.buffer[..end]));
        self.buffer.drain(..end);
    }
}

/// Length of `bytes` without the beginning of a character at their end.
fn whole_characters(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() && error.valid_up_to() > 0 => error.valid_up_to(),
        _ => bytes.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(chunks: &[&[u8]]) -> Vec<String> {
        let (mut lines, mut found) = (Lines::default(), Vec::new());
        for chunk in chunks {
            lines.push(chunk, |line| found.push(line.to_owned()));
        }
        lines.finish(|line| found.push(line.to_owned()));
        found
    }

    #[test]
    fn lines_whatever_the_chunks() {
        assert_eq!(split(&[b"a\nb", b"c\n\nd"]), ["a", "bc", "", "d"]);
        assert_eq!(split(&[b"dos\r", b"\nnext\r\r\n"]), ["dos", "next"]);
        assert_eq!(split(&[b"1%\r50", b"%\r100%\n", b"50%\r"]), ["100%", "50%"]);
        assert_eq!(split(&["ü".as_bytes().split_at(1).0, &[0xbc, b'\n'], b"\xff\n"]), ["ü", "\u{fffd}"]);
        assert!(split(&[]).is_empty());
    }

    #[test]
    fn a_line_without_end_comes_in_pieces_of_whole_characters() {
        let text = format!("x{}", "ü".repeat(100_000));
        let found = split(&[text.as_bytes()]);
        assert!(found.len() > 2 && found.iter().all(|piece| piece.len() <= LONGEST && !piece.contains('\u{fffd}')));
        assert_eq!(found.concat(), text);
    }
}
