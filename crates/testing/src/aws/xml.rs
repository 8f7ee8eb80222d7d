//! As much XML as EC2's answers are made of: elements with text or elements in
//! them, and attributes that nobody looks at.

use std::fmt::Write as _;

/// One element.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Element {
    pub(crate) name: String,
    /// As they stand, with the space before them.
    attributes: String,
    pub(crate) text: String,
    pub(crate) children: Vec<Element>,
}

impl Element {
    /// An element with `text` in it.
    pub(crate) fn new(name: &str, text: impl Into<String>) -> Self {
        Self { name: name.into(), text: text.into(), ..Self::default() }
    }

    /// An element with others in it.
    pub(crate) fn of(name: &str, children: Vec<Self>) -> Self {
        Self { name: name.into(), children, ..Self::default() }
    }

    /// The element that a document consists of; `None` when it is none.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut open: Vec<Self> = vec![Self::default()];
        let mut rest = text;
        while let Some(at) = rest.find('<') {
            open.last_mut()?.text += &unescape(&rest[..at]);
            rest = &rest[at..];
            if let Some(comment) = rest.strip_prefix("<!--") {
                rest = comment.split_once("-->")?.1;
                continue;
            }
            let (tag, after) = rest[1..].split_once('>')?;
            rest = after;
            if tag.starts_with(['?', '!']) {
                continue;
            }
            if let Some(name) = tag.strip_prefix('/') {
                let mut done = open.pop().filter(|element| element.name == name.trim())?;
                if !done.children.is_empty() {
                    done.text.clear();
                }
                open.last_mut()?.children.push(done);
                continue;
            }
            let (tag, empty) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
            let end = tag.find(char::is_whitespace).unwrap_or(tag.len());
            let element = Self { name: tag[..end].into(), attributes: tag[end..].trim_end().into(), ..Self::default() };
            if empty { open.last_mut()?.children.push(element) } else { open.push(element) }
        }
        let mut document = open.pop().filter(|_| open.is_empty())?;
        (document.children.len() == 1).then(|| document.children.remove(0))
    }

    /// The first element of that name in this one.
    pub(crate) fn child(&self, name: &str) -> Option<&Self> {
        self.children.iter().find(|child| child.name == name)
    }

    /// The same, to be changed.
    pub(crate) fn child_mut(&mut self, name: &str) -> Option<&mut Self> {
        self.children.iter_mut().find(|child| child.name == name)
    }

    /// The text at a path such as `instanceState/name`; empty when it is not there.
    pub(crate) fn at(&self, path: &str) -> &str {
        path.split('/').try_fold(self, |element, name| element.child(name)).map_or("", |element| element.text.trim())
    }

    /// What is in the set of that name, one `item` after the other.
    pub(crate) fn items(&self, set: &str) -> &[Self] {
        self.child(set).map_or(&[], |set| &set.children)
    }

    /// Puts an element in the place of the one with its name, or behind all.
    pub(crate) fn put(&mut self, element: Self) {
        match self.child_mut(&element.name) {
            Some(there) => *there = element,
            None => self.children.push(element),
        }
    }

    /// Puts text into the element of that name.
    pub(crate) fn set(&mut self, name: &str, text: impl Into<String>) {
        self.put(Self::new(name, text));
    }

    /// Keeps, at any depth, the `item`s that `keep` wants.
    pub(crate) fn keep(&mut self, keep: &dyn Fn(&Self) -> bool) {
        self.children.retain(|child| child.name != "item" || keep(child));
        self.children.iter_mut().for_each(|child| child.keep(keep));
    }

    /// The document.
    pub(crate) fn render(&self) -> String {
        let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
        self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) {
        let _ = write!(out, "<{}{}>", self.name, self.attributes);
        if self.children.is_empty() {
            out.push_str(&escape(&self.text));
        }
        self.children.iter().for_each(|child| child.write(out));
        let _ = write!(out, "</{}>", self.name);
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn unescape(text: &str) -> String {
    if !text.contains('&') {
        return text.into();
    }
    let mut out = String::new();
    let mut pieces = text.split('&');
    out.push_str(pieces.next().unwrap_or_default());
    for piece in pieces {
        let (name, rest) = piece.split_once(';').unwrap_or((piece, ""));
        let number = |digits: &str, radix| u32::from_str_radix(digits, radix).ok().and_then(char::from_u32);
        let letter = match name {
            "amp" => Some('&'),
            "lt" => Some('<'),
            "gt" => Some('>'),
            "quot" => Some('"'),
            "apos" => Some('\''),
            _ => match name.strip_prefix('#') {
                Some(digits) => digits.strip_prefix('x').map_or_else(|| number(digits, 10), |digits| number(digits, 16)),
                None => None,
            },
        };
        match letter {
            Some(letter) => out.push(letter),
            None => {
                let _ = write!(out, "&{name};");
            }
        }
        out.push_str(rest);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "<?xml version=\"1.0\"?>\n<!-- a > b -->\n<Answer xmlns=\"http://x/\">\n <set>\n  <item><id>a</id><name>x &amp; &lt;y&#62;</name></item>\n  <item><id>b</id><none/></item>\n </set>\n</Answer>\n";

    #[test]
    fn a_document_is_read_and_written_again() {
        let read = Element::parse(TEXT).unwrap();
        assert_eq!(read.name, "Answer");
        assert_eq!(read.items("set").len(), 2);
        assert_eq!(read.items("set")[0].at("name"), "x & <y>");
        assert_eq!(read.at("set/item/id"), "a");
        assert_eq!(read.at("set/nothing"), "");
        let written = read.render();
        assert!(written.contains("<Answer xmlns=\"http://x/\"><set><item><id>a</id><name>x &amp; &lt;y&gt;</name>"), "{written}");
        assert_eq!(Element::parse(&written), Some(read));
    }

    #[test]
    fn elements_are_changed_and_left_out() {
        let mut read = Element::parse(TEXT).unwrap();
        read.keep(&|item| item.at("id") != "a");
        assert_eq!(read.items("set").len(), 1);
        let item = read.child_mut("set").and_then(|set| set.children.first_mut()).unwrap();
        item.set("id", "c");
        item.set("new", "d");
        assert_eq!((read.at("set/item/id"), read.at("set/item/new")), ("c", "d"));
    }

    #[test]
    fn what_is_no_document_is_none() {
        for text in ["", "no", "<a>", "<a></b>", "<a/><b/>", "</a>", "<a"] {
            assert_eq!(Element::parse(text), None, "{text}");
        }
    }
}
