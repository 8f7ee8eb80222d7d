//! EC2's requests: a form whose names are paths with numbers in them, such as
//! `Filter.1.Value.2`.

/// The pairs of a form, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Query(Vec<(String, String)>);

/// `Filter.N`: a name, and values of which one has to fit. `*` and `?` are wild.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Filter {
    pub(crate) name: String,
    pub(crate) values: Vec<String>,
}

impl Filter {
    /// Whether one of the values fits.
    pub(crate) fn fits(&self, value: &str) -> bool {
        self.values.iter().any(|pattern| wild(pattern.as_bytes(), value.as_bytes()))
    }
}

fn wild(pattern: &[u8], value: &[u8]) -> bool {
    match (pattern.split_first(), value.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => wild(rest, value) || value.split_first().is_some_and(|(_, value)| wild(pattern, value)),
        (Some((one, rest)), Some((other, value))) => (*one == b'?' || one == other) && wild(rest, value),
        _ => false,
    }
}

impl Query {
    /// A request for `action`, of the version that EC2 has had since 2016.
    pub(crate) fn new(action: &str) -> Self {
        Self(vec![("Action".into(), action.into()), ("Version".into(), "2016-11-15".into())])
    }

    /// Adds a pair.
    pub(crate) fn with(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.0.push((name.into(), value.into()));
        self
    }

    /// Of a body.
    pub(crate) fn parse(body: &[u8]) -> Self {
        let text = String::from_utf8_lossy(body);
        let pair = |pair: &str| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name), decode(value))
        };
        Self(text.split('&').filter(|text| !text.is_empty()).map(pair).collect())
    }

    /// The body.
    pub(crate) fn encode(&self) -> String {
        let pairs: Vec<_> = self.0.iter().map(|(name, value)| format!("{}={}", encode(name), encode(value))).collect();
        pairs.join("&")
    }

    /// All pairs.
    pub(crate) fn pairs(&self) -> &[(String, String)] {
        &self.0
    }

    /// The value of a name; empty ones are none.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    /// What is asked for.
    pub(crate) fn action(&self) -> &str {
        self.get("Action").unwrap_or_default()
    }

    /// Whether a name says `true`.
    pub(crate) fn is(&self, name: &str) -> bool {
        self.get(name) == Some("true")
    }

    /// The numbers that follow `prefix.`, in order.
    pub(crate) fn numbers(&self, prefix: &str) -> Vec<u32> {
        let number = |name: &str| name.strip_prefix(prefix)?.strip_prefix('.')?.split('.').next()?.parse().ok();
        let mut all: Vec<u32> = self.0.iter().filter_map(|(name, _)| number(name)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The values of `prefix.1`, `prefix.2` and so on.
    pub(crate) fn list(&self, prefix: &str) -> Vec<&str> {
        self.numbers(prefix).into_iter().filter_map(|number| self.get(&format!("{prefix}.{number}"))).collect()
    }

    /// The filters.
    pub(crate) fn filters(&self) -> Vec<Filter> {
        let filter = |number| {
            let name = self.get(&format!("Filter.{number}.Name"))?.to_owned();
            Some(Filter { name, values: self.list(&format!("Filter.{number}.Value")).into_iter().map(Into::into).collect() })
        };
        self.numbers("Filter").into_iter().filter_map(filter).collect()
    }

    /// The same request with these filters alone.
    pub(crate) fn filtered(&self, filters: &[Filter]) -> Self {
        let mut query = self.without("Filter");
        for (number, filter) in (1..).zip(filters) {
            query = query.with(format!("Filter.{number}.Name"), &filter.name);
            for (place, value) in (1..).zip(&filter.values) {
                query = query.with(format!("Filter.{number}.Value.{place}"), value);
            }
        }
        query
    }

    /// The same request without a name, and all that begins with it and a dot.
    pub(crate) fn without(&self, prefix: &str) -> Self {
        let of = |name: &str| name.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        Self(self.0.iter().filter(|(name, _)| !of(name)).cloned().collect())
    }

    /// The tags that a resource of this kind is to have from the beginning.
    pub(crate) fn tags(&self, resource: &str) -> Vec<(String, String)> {
        let mut tags = Vec::new();
        for number in self.numbers("TagSpecification") {
            let at = format!("TagSpecification.{number}");
            if self.get(&format!("{at}.ResourceType")) != Some(resource) {
                continue;
            }
            for place in self.numbers(&format!("{at}.Tag")) {
                let value = |name: &str| self.get(&format!("{at}.Tag.{place}.{name}")).unwrap_or_default().to_owned();
                tags.push((value("Key"), value("Value")));
            }
        }
        tags
    }
}

fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let escaped = || u8::from_str_radix(text.get(at + 1..at + 3)?, 16).ok();
        match (byte, escaped()) {
            (b'%', Some(byte)) => {
                out.push(byte);
                at += 2;
            }
            (b'+', _) => out.push(b' '),
            _ => out.push(*byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_is_read_and_written_again() {
        let query = Query::parse(b"Action=DescribeImages&Version=2016-11-15&Owner.1=self&Filter.2.Name=tag%3Aa+b&Filter.2.Value.1=%2A&Filter.2.Value.10=x&Filter.2.Value.2=&Filter.1.Name=name&Filter.1.Value.1=w%C3%BCrfel");
        assert_eq!(query.action(), "DescribeImages");
        assert_eq!(query.list("Owner"), ["self"]);
        let filters = query.filters();
        assert_eq!(filters[0], Filter { name: "name".into(), values: vec!["würfel".into()] });
        assert_eq!(filters[1], Filter { name: "tag:a b".into(), values: vec!["*".into(), "x".into()] });
        assert_eq!(Query::parse(query.encode().as_bytes()), query);
        assert_eq!(query.filtered(&filters[1..]).filters(), filters[1..]);
    }

    #[test]
    fn tags_are_of_a_kind() {
        let query = Query::new("CreateImage")
            .with("TagSpecification.1.ResourceType", "image")
            .with("TagSpecification.1.Tag.1.Key", "a")
            .with("TagSpecification.1.Tag.1.Value", "b")
            .with("TagSpecification.2.ResourceType", "snapshot")
            .with("TagSpecification.2.Tag.1.Key", "c");
        assert_eq!(query.tags("image"), [("a".into(), "b".into())]);
        assert_eq!(query.tags("snapshot"), [("c".into(), String::new())]);
        assert!(query.without("TagSpecification").tags("image").is_empty());
    }

    #[test]
    fn filters_have_wild_places() {
        let fits = |pattern: &str, value: &str| Filter { name: String::new(), values: vec![pattern.into()] }.fits(value);
        assert!(fits("web-*", "web-1.4") && fits("*", "") && fits("a?c*", "abcd") && fits("a", "a"));
        assert!(!fits("web-*", "db-web-1") && !fits("a?c", "ac") && !fits("", "a"));
    }
}
