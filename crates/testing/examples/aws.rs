//! The front as a program, for scripts: `ci/bench-ec2`, or a person who wants
//! to see what `kiln publish` does.
//!
//! ```text
//! cargo run --release -p kiln-testing --example aws -- [--alone] [--settling MS]
//! ```
//!
//! Says where it is, and what a client has to find in its environment, as one
//! line of JSON. Then answers each line on standard input with a line of JSON,
//! and ends with it:
//!
//! ```text
//! calls             how often each call came
//! forget            counting begins anew
//! snapshots         ids
//! raw ID FILE       a snapshot as a raw disk
//! ```
#![allow(clippy::print_stdout, reason = "it is its output")]

use std::collections::BTreeMap;
use std::error::Error;
use std::io::BufRead as _;
use std::path::Path;
use std::time::Duration;

use kiln_testing::{Aws, Moto};
use serde_json::{Value, json};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let settling = arguments.iter().position(|argument| argument == "--settling").and_then(|at| arguments.get(at + 1));
    let moto = if arguments.iter().any(|argument| argument == "--alone") { None } else { Some(Moto::start()?) };
    let aws = match &moto {
        Some(moto) => Aws::before(moto)?,
        None => Aws::alone()?,
    };
    if let Some(settling) = settling {
        aws.settling(Duration::from_millis(settling.parse()?));
    }
    let environment: BTreeMap<_, _> = aws.environment().into_iter().collect();
    println!("{}", json!({ "address": aws.address(), "environment": environment }));
    for line in std::io::stdin().lock().lines() {
        println!("{}", answer(&aws, &line?)?);
    }
    Ok(())
}

fn answer(aws: &Aws, line: &str) -> Result<Value, Box<dyn Error>> {
    let words: Vec<&str> = line.split_whitespace().collect();
    Ok(match words[..] {
        ["calls"] => {
            let mut counts = BTreeMap::<String, usize>::new();
            aws.calls().into_iter().for_each(|call| *counts.entry(call.action).or_default() += 1);
            json!(counts)
        }
        ["forget"] => {
            aws.forget();
            json!({})
        }
        ["snapshots"] => json!(aws.snapshots()),
        ["raw", id, file] => {
            aws.snapshot_to_raw(id, Path::new(file))?;
            json!({ "raw": file })
        }
        _ => json!({ "error": format!("no such command: {line}") }),
    })
}
