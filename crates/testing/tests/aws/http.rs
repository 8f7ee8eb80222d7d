//! HTTP, as little as these tests need: one request on each connection.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use kiln_testing::Aws;

/// What was answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    /// The value of a header, by its name in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let line = |line: &'_ str| line.split_once(": ").is_some_and(|(key, _)| key.eq_ignore_ascii_case(name));
        self.head.lines().find(|text| line(text)).and_then(|line| line.split_once(": ")).map(|(_, value)| value)
    }

    /// `reason` of EBS's error.
    pub(crate) fn reason(&self) -> String {
        self.json()["Reason"].as_str().unwrap_or_default().to_owned()
    }

    /// Text of the first element of that name.
    pub(crate) fn element(&self, name: &str) -> String {
        self.elements(name).into_iter().next().unwrap_or_default()
    }

    /// Text of all elements of that name.
    pub(crate) fn elements(&self, name: &str) -> Vec<String> {
        let text = self.text();
        let (open, close) = (format!("<{name}>"), format!("</{name}>"));
        text.split(&open).skip(1).filter_map(|rest| Some(rest.split_once(&close)?.0.to_owned())).collect()
    }
}

/// One request; `None` when the connection breaks in place of an answer.
pub(crate) fn try_ask(aws: &Aws, region: &str, service: &str, line: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<Answer> {
    let mut stream = TcpStream::connect(aws.address()).unwrap();
    let mut head = format!(
        "{line} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n\
         Authorization: AWS4-HMAC-SHA256 Credential=test/20261121/{region}/{service}/aws4_request, SignedHeaders=host, Signature=0\r\n",
        aws.address(),
        body.len()
    );
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(b"\r\n").unwrap();
    // It may be refused before all of it was sent.
    let _ = stream.write_all(body);
    let mut answer = Vec::new();
    if stream.read_to_end(&mut answer).is_err() || answer.is_empty() {
        return None;
    }
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Some(Answer { status, head, body: answer[end + 4..].to_vec() })
}

/// A call of EC2 with these parameters.
pub(crate) fn ec2(aws: &Aws, region: &str, action: &str, parameters: &[(&str, &str)]) -> Answer {
    try_ec2(aws, region, action, parameters).unwrap()
}

/// The same, where there may be no answer.
pub(crate) fn try_ec2(aws: &Aws, region: &str, action: &str, parameters: &[(&str, &str)]) -> Option<Answer> {
    let mut body = format!("Action={action}&Version=2016-11-15");
    for (name, value) in parameters {
        body += &format!("&{name}={}", value.replace('%', "%25").replace('&', "%26").replace('+', "%2B"));
    }
    try_ask(aws, region, "ec2", "POST /", &[("Content-Type", "application/x-www-form-urlencoded; charset=utf-8")], body.as_bytes())
}

/// A call of EBS.
pub(crate) fn ebs(aws: &Aws, line: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    try_ask(aws, "eu-central-1", "ebs", line, headers, body).unwrap()
}
