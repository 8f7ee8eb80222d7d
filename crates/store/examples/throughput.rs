//! How fast a raw disk goes into a store and out of it, and the peak memory.
//! `cargo run --release -p kiln-store --example throughput -- DISK STORE`
#![allow(clippy::print_stdout, reason = "it is its output")]

use std::path::PathBuf;
use std::time::Instant;

use kiln_disk::raw::RawSource;
use kiln_model::block::ImageSink as _;
use kiln_store::Store;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(disk), Some(folder)) = (args.next(), args.next()) else { return Err("usage: throughput DISK STORE".into()) };
    let store = Store::open(&folder)?;
    let rate = |what: &str, bytes: u64, since: Instant| {
        let seconds = since.elapsed().as_secs_f64();
        println!("{what}: {seconds:.2} s, {:.0} MB/s of {} MB", bytes as f64 / 1e6 / seconds, bytes / 1_000_000);
    };
    let since = Instant::now();
    let record = store.write_disk("root", &mut RawSource::open(&disk)?, None, &[], &mut |_, _| {})?;
    rate("in", record.used, since);
    println!("stored {} MB as {}", record.stored / 1_000_000, record.map_digest);
    let since = Instant::now();
    store.write_disk("root", &mut RawSource::open(&disk)?, None, std::slice::from_ref(&record), &mut |_, _| {})?;
    rate("in again", record.used, since);
    let out = folder.join("out.raw");
    let since = Instant::now();
    store.materialise(&record, &out, &mut |_, _| {})?;
    rate("out", record.used, since);
    std::fs::remove_file(out)?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    println!("{}", status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default());
    Ok(())
}
