//! What the tests of provisioners share: settings as a template gives them, and
//! what is shown of a step.
#![allow(dead_code, reason = "not every test uses all of it")]

use std::sync::Mutex;

use kiln_model::event::{Event, Reporter};
use kiln_model::settings::{Entry, Node, Place, Table, Value};

/// What the step `step` has shown.
#[derive(Default)]
pub(crate) struct Log(Mutex<Vec<String>>);

impl Log {
    pub(crate) fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

impl Reporter for Log {
    fn report(&self, event: Event) {
        if let Event::Output { name, line, .. } = event {
            assert_eq!(name, "step");
            self.0.lock().unwrap().push(line);
        }
    }
}

pub(crate) fn node(value: Value) -> Node {
    Node { value, place: Place::default() }
}

pub(crate) fn string(text: &str) -> Value {
    Value::String(text.into())
}

pub(crate) fn strings(texts: &[&str]) -> Value {
    Value::Array(texts.iter().map(|text| node(string(text))).collect())
}

pub(crate) fn table(entries: &[(&str, Value)]) -> Value {
    let entry = |(name, value): &(&str, Value)| Entry { name: (*name).into(), place: Place::default(), node: node(value.clone()) };
    Value::Table(Table { entries: entries.iter().map(entry).collect() })
}
