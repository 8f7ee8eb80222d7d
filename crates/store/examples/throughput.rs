//! How fast a disk goes into a store and out of it, what each part of that
//! costs, and the peak memory. Processor time says more than the clock while
//! other programs run.
//!
//! ```text
//! cargo run --release -p kiln-store --example throughput -- ACTION
//!   make DISK MIB     a raw disk of that size that compresses about 3:1
//!   parts DISK        what digesting and compressing its blocks costs one core
//!   in DISK STORE     the disk into the store, which does not know it
//!   again DISK STORE  the disk into the store, which does
//!   out STORE FILE    the last disk of the store to a raw file
//!   verify STORE      everything in the store
//! ```
//!
//! `ci/throughput` compares the whole program with zstd and sha256sum.
#![allow(clippy::print_stdout, reason = "it is its output")]

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use kiln_disk::blocks::{BATCH, Decoder, Frame};
use kiln_disk::lanes;
use kiln_disk::raw::RawSource;
use kiln_model::Digest;
use kiln_model::block::{BLOCK, BlockSource as _, ImageSink as _};
use kiln_model::image::{Config, DiskConfig, DiskRecord, Firmware};
use kiln_store::{Publish, Store};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// The blocks that `parts` looks at: 256 MiB.
const SAMPLE: u64 = 512;

/// Clock ticks in a second, as /proc counts processor time on Linux.
const TICKS: f64 = 100.0;

fn main() -> Result {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["make", disk, mib] => make(Path::new(disk), mib.parse()?),
        ["parts", disk] => parts(Path::new(disk)),
        ["in", disk, store] => take_in(Path::new(disk), &Store::open(Path::new(store))?, &[]),
        ["again", disk, store] => {
            let store = Store::open(Path::new(store))?;
            let last = last(&store)?;
            take_in(Path::new(disk), &store, &[last])
        }
        ["out", store, file] => {
            let store = Store::open(Path::new(store))?;
            let record = last(&store)?;
            measured("out", record.used, || Ok(store.materialise(&record, Path::new(file), &mut |_, _| {})?))
        }
        ["verify", store] => {
            let store = Store::open(Path::new(store))?;
            let used = last(&store)?.used;
            measured("verify", used, || {
                let found = store.verify(&mut |_, _| {})?;
                found.damaged.into_iter().next().map_or(Ok(()), |damage| Err(damage.error.into()))
            })
        }
        _ => Err("see the beginning of crates/store/examples/throughput.rs".into()),
    }?;
    let status = std::fs::read_to_string("/proc/self/status")?;
    println!("{}", status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or_default());
    Ok(())
}

/// Does `work`, and prints what it took for `bytes` bytes.
fn measured<T>(what: &str, bytes: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let (since, user, system) = (Instant::now(), processor(11)?, processor(12)?);
    let done = work()?;
    let seconds = since.elapsed().as_secs_f64();
    let (user, system) = (processor(11)? - user, processor(12)? - system);
    let gib = bytes as f64 / f64::from(1 << 30);
    println!(
        "{what:<16} {seconds:6.2} s  {:5.0} MB/s  per GiB: {:.2} s user, {:.2} s system",
        bytes as f64 / 1e6 / seconds,
        user / gib,
        system / gib
    );
    Ok(done)
}

/// Seconds of processor time of this process; `field` is counted behind the
/// name in proc(5)'s `stat`.
fn processor(field: usize) -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields.split_whitespace()).into_iter().flatten();
    Ok(fields.into_iter().nth(field).ok_or("no such field")?.parse::<f64>()? / TICKS)
}

/// Numbers that are the same in each run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> usize {
        usize::try_from(((self.next() >> 32) * limit) >> 32).unwrap_or(0)
    }
}

/// A disk of words, some frequent and most not, with noise between them.
fn make(disk: &Path, mib: u64) -> Result {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let words: Vec<Vec<u8>> = (0..4096)
        .map(|_| (0..3 + numbers.below(14)).map(|_| b"etaoinshrdlucmfwypvbgkqjxz_-/.0123456789"[numbers.below(40)]).collect())
        .collect();
    let mut file = std::io::BufWriter::with_capacity(1 << 20, File::create(disk)?);
    let mut left = usize::try_from(mib << 20)?;
    let mut piece = Vec::with_capacity(1024);
    while left > 0 {
        piece.clear();
        for _ in 0..20 {
            // The product of two is small more often than large.
            let word = numbers.below(4096) * numbers.below(4096) / 4096;
            piece.extend_from_slice(&words[word]);
            piece.push(b' ');
        }
        piece.extend_from_slice(&numbers.next().to_le_bytes());
        let length = piece.len().min(left);
        file.write_all(&piece[..length])?;
        left -= length;
    }
    file.into_inner()?.sync_all()?;
    Ok(())
}

/// What the parts of the way cost one core.
fn parts(disk: &Path) -> Result {
    let mut source = RawSource::open(disk)?;
    let count = SAMPLE.min(source.size() / BLOCK);
    let bytes = count * BLOCK;
    let mut blocks = vec![vec![0; usize::try_from(BLOCK)?]; usize::try_from(count)?];
    let mut read = || (0..).zip(&mut blocks).try_for_each(|(index, block)| source.read_at(index * BLOCK, block));
    read()?;
    measured("read", bytes, || Ok(read()?))?;
    let one = measured("sha2", bytes, || Ok(blocks.iter().map(Digest::of).collect::<Vec<_>>()))?;
    let slices: Vec<&[u8]> = blocks.iter().map(Vec::as_slice).collect();
    let many = measured("sha2 in lanes", bytes, || Ok(lanes::digests(&slices)))?;
    if one != many {
        return Err("digests in lanes are wrong".into());
    }
    let frames = measured("zstd", bytes, || {
        let mut context = zstd::bulk::Compressor::new(3)?;
        Ok(slices.iter().map(|block| context.compress(block)).collect::<std::io::Result<Vec<_>>>()?)
    })?;
    let stored: usize = frames.iter().map(Vec::len).sum();
    println!("compresses {:.2}:1", bytes as f64 / stored as f64);
    let frames: Vec<Frame<'_>> = frames.iter().zip(&one).map(|(bytes, digest)| Frame { bytes, digest: *digest, pack: *digest }).collect();
    let mut decoder = Decoder::new()?;
    measured("zstd -d, sha2", bytes, || Ok(frames.iter().try_for_each(|f| decoder.decode(f.bytes, &f.digest, &f.pack).map(drop))?))?;
    measured("… in lanes", bytes, || {
        Ok(frames.chunks(BATCH).try_for_each(|batch| decoder.decode_all(batch).try_for_each(|block| block.map(drop)))?)
    })
}

/// Takes a disk in, and names it.
fn take_in(disk: &Path, store: &Store, parents: &[DiskRecord]) -> Result {
    let what = if parents.is_empty() { "in" } else { "again" };
    let used = RawSource::open(disk)?.size();
    let record = measured(what, used, || Ok(store.write_disk("root", &mut RawSource::open(disk)?, None, parents, &mut |_, _| {})?))?;
    println!("stored {} MB of {} MB as {}", record.stored / 1_000_000, record.used / 1_000_000, record.map_digest);
    let disks = vec![DiskConfig { name: record.name.clone(), size: record.map.size, digest: record.digest, root: true }];
    let config = Config { disks, ..Config::new("throughput", "1", "amd64", Firmware::Bios) };
    store.publish_as(&Publish { config: &config, disks: &[record], annotations: &BTreeMap::new(), tags: &[] })?;
    Ok(())
}

/// The disk that was taken in last.
fn last(store: &Store) -> Result<DiskRecord> {
    Ok(store.record(&store.resolve(&"throughput:1".parse()?)?)?)
}
