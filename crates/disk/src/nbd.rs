//! NBD: reading (and, to grow a partition, writing) a disk of any format that
//! QEMU knows as raw bytes, without root.
//!
//! Protocol: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>;
//! the context `qemu:allocation-depth` in QEMU's `docs/interop/nbd.txt`. Fixed
//! newstyle negotiation, structured replies, one request at a time.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use kiln_model::{Code, Error, Result};

const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERROR: u32 = 1 << 31;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const STRUCTURED_REPLY: u32 = 0x668e_33ef;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISCONNECT: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_BLOCK_STATUS: u16 = 7;
const FLAG_DONE: u16 = 1;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 1 << 15;

/// The longest option reply or status chunk that is taken, in bytes: no server
/// may make this client allocate without bound.
const LIMIT: usize = 64 << 20;

/// The most that is read or written in one request; QEMU refuses over 32 MiB.
const REQUEST_LIMIT: usize = 16 << 20;

/// The longest stretch asked about at once, in bytes; a multiple of any block
/// size below the protocol's 4 GiB.
const STATUS_LIMIT: u64 = 1 << 30;

/// A stretch in one context: length in bytes and the context's flags.
pub(crate) type Stretch = (u64, u32);

/// What is known of a disk from its two contexts.
#[derive(Debug, Default)]
pub(crate) struct Status {
    /// `base:allocation`: bit 0 hole, bit 1 reads as zeros.
    pub(crate) allocation: Vec<Stretch>,
    /// `qemu:allocation-depth`: 0 nowhere, 1 in the top layer, 2 in the one
    /// below, and so on.
    pub(crate) depth: Vec<Stretch>,
}

/// A connection to an export.
pub struct Client {
    stream: UnixStream,
    size: u64,
    cookie: u64,
    allocation: Option<u32>,
    depth: Option<u32>,
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the NBD server sent {what}"))
}

impl Client {
    /// Negotiates with the server of the one unnamed export.
    ///
    /// # Errors
    /// When the server goes away or does not speak the protocol.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        let mut client = Self { stream, size: 0, cookie: 0, allocation: None, depth: None };
        client.negotiate()?;
        Ok(client)
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// When the server cannot read the disk or goes away.
    pub fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut at = offset;
        for part in buffer.chunks_mut(REQUEST_LIMIT) {
            self.read_part(at, part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// When the server cannot write the disk or goes away.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut at = offset;
        for part in bytes.chunks(REQUEST_LIMIT) {
            self.request(CMD_WRITE, at, part.len())?;
            self.stream.write_all(part)?;
            self.acknowledged()?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// When the server cannot do so.
    pub fn flush(&mut self) -> io::Result<()> {
        self.request(CMD_FLUSH, 0, 0)?;
        self.acknowledged()
    }

    /// The whole disk's status in both contexts.
    pub(crate) fn status(&mut self) -> io::Result<Status> {
        let mut whole = Status::default();
        let mut offset = 0;
        while offset < self.size {
            let length = STATUS_LIMIT.min(self.size - offset);
            let part = self.status_part(offset, length)?;
            // Each context may say less than was asked for, or more.
            let told = |stretches: &[Stretch]| stretches.iter().map(|s| s.0).sum::<u64>();
            let mut known = length.min(told(&part.allocation));
            if self.depth.is_some() {
                known = known.min(told(&part.depth));
            }
            if known == 0 {
                return Err(broken("no status"));
            }
            append(&mut whole.allocation, &part.allocation, known);
            append(&mut whole.depth, &part.depth, known);
            offset += known;
        }
        Ok(whole)
    }

    /// Whether the server tells which layer something comes from.
    pub(crate) fn knows_depth(&self) -> bool {
        self.depth.is_some()
    }

    fn negotiate(&mut self) -> io::Result<()> {
        let mut hello = [0; 18];
        self.stream.read_exact(&mut hello)?;
        if hello[..8] != *b"NBDMAGIC" || hello[8..16] != IHAVEOPT.to_be_bytes() {
            return Err(broken("no newstyle greeting"));
        }
        let flags = u16::from_be_bytes([hello[16], hello[17]]);
        if flags & 1 == 0 {
            return Err(broken("an old greeting"));
        }
        // Fixed newstyle, no padding: as far as the server has them.
        self.stream.write_all(&u32::from(flags & 0b11).to_be_bytes())?;
        self.option(OPT_STRUCTURED_REPLY, &[])?;
        if self.option_reply(OPT_STRUCTURED_REPLY)?.0 != REP_ACK {
            return Err(broken("no structured replies"));
        }
        self.contexts()?;
        // An empty name, and no information asked for.
        self.option(OPT_GO, &[0; 6])?;
        loop {
            let (kind, data) = self.option_reply(OPT_GO)?;
            match kind {
                REP_ACK => return Ok(()),
                // Information 0, the export: size u64, flags u16.
                REP_INFO if data.len() >= 12 && data[..2] == [0, 0] => {
                    self.size = data[2..10].try_into().map(u64::from_be_bytes).map_err(|_| broken("no size"))?;
                }
                REP_INFO => {}
                _ => return Err(io::Error::other(format!("the NBD server refused: {}", String::from_utf8_lossy(&data)))),
            }
        }
    }

    fn contexts(&mut self) -> io::Result<()> {
        let names = ["base:allocation", "qemu:allocation-depth"];
        let mut data = 0_u32.to_be_bytes().to_vec();
        data.extend((names.len() as u32).to_be_bytes());
        for name in names {
            data.extend((name.len() as u32).to_be_bytes());
            data.extend(name.as_bytes());
        }
        self.option(OPT_SET_META_CONTEXT, &data)?;
        loop {
            let (kind, data) = self.option_reply(OPT_SET_META_CONTEXT)?;
            match kind {
                REP_ACK => return Ok(()),
                REP_META_CONTEXT if data.len() > 4 => {
                    let id = Some(u32::from_be_bytes([data[0], data[1], data[2], data[3]]));
                    match &data[4..] {
                        b"base:allocation" => self.allocation = id,
                        b"qemu:allocation-depth" => self.depth = id,
                        _ => {}
                    }
                }
                _ => return Err(broken("no contexts")),
            }
        }
    }

    fn option(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let mut message = IHAVEOPT.to_be_bytes().to_vec();
        message.extend(option.to_be_bytes());
        message.extend((data.len() as u32).to_be_bytes());
        message.extend(data);
        self.stream.write_all(&message)
    }

    fn option_reply(&mut self, option: u32) -> io::Result<(u32, Vec<u8>)> {
        let (magic, for_option) = (self.u64()?, self.u32()?);
        let (kind, length) = (self.u32()?, self.u32()?);
        if magic != OPTION_REPLY || for_option != option {
            return Err(broken("a reply to something else"));
        }
        let data = self.bytes(length)?;
        if kind & REP_ERROR != 0 {
            return Err(io::Error::other(format!("the NBD server refused option {option}: {}", String::from_utf8_lossy(&data))));
        }
        Ok((kind, data))
    }

    fn request(&mut self, command: u16, offset: u64, length: usize) -> io::Result<()> {
        self.cookie += 1;
        let length = u32::try_from(length).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut message = Vec::with_capacity(28);
        message.extend(REQUEST.to_be_bytes());
        message.extend(0_u16.to_be_bytes());
        message.extend(command.to_be_bytes());
        message.extend(self.cookie.to_be_bytes());
        message.extend(offset.to_be_bytes());
        message.extend(length.to_be_bytes());
        self.stream.write_all(&message)
    }

    fn read_part(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.request(CMD_READ, offset, buffer.len())?;
        let mut filled = 0;
        loop {
            let (flags, kind, length) = self.chunk()?;
            match kind {
                CHUNK_DATA if length >= 8 => {
                    let at = self.within(offset, buffer.len(), u64::from(length) - 8)?;
                    let part = &mut buffer[at..at + length as usize - 8];
                    self.stream.read_exact(part)?;
                    filled += part.len();
                }
                CHUNK_HOLE if length == 12 => {
                    let start = self.u64()?;
                    let count = self.u32()?;
                    let at = place(start, offset, buffer.len(), u64::from(count))?;
                    buffer[at..at + count as usize].fill(0);
                    filled += count as usize;
                }
                0 if length == 0 => {}
                _ => return Err(self.refused(kind, length)),
            }
            if flags & FLAG_DONE != 0 {
                return if filled == buffer.len() { Ok(()) } else { Err(broken("less than was asked for")) };
            }
        }
    }

    /// Reads the offset of a data chunk; gives its place in the buffer.
    fn within(&mut self, offset: u64, length: usize, count: u64) -> io::Result<usize> {
        let start = self.u64()?;
        place(start, offset, length, count)
    }

    fn status_part(&mut self, offset: u64, length: u64) -> io::Result<Status> {
        let asked = usize::try_from(length).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        self.request(CMD_BLOCK_STATUS, offset, asked)?;
        let mut status = Status::default();
        loop {
            let (flags, kind, length) = self.chunk()?;
            match kind {
                CHUNK_STATUS if length >= 12 && length % 8 == 4 => {
                    let context = Some(self.u32()?);
                    let data = self.bytes(length - 4)?;
                    let stretches = data
                        .as_chunks::<8>()
                        .0
                        .iter()
                        .map(|[a, b, c, d, flags @ ..]| (u64::from(u32::from_be_bytes([*a, *b, *c, *d])), u32::from_be_bytes(*flags)));
                    if context == self.allocation {
                        status.allocation.extend(stretches);
                    } else if context == self.depth {
                        status.depth.extend(stretches);
                    }
                }
                0 if length == 0 => {}
                _ => return Err(self.refused(kind, length)),
            }
            if flags & FLAG_DONE != 0 {
                return Ok(status);
            }
        }
    }

    /// Waits for the answer to a request that has none but success.
    fn acknowledged(&mut self) -> io::Result<()> {
        let magic = self.u32()?;
        if magic == SIMPLE_REPLY {
            let (error, cookie) = (self.u32()?, self.u64()?);
            return match error {
                _ if cookie != self.cookie => Err(broken("an answer to something else")),
                0 => Ok(()),
                error => Err(errno(error)),
            };
        }
        let (flags, kind, length) = self.chunk_after(magic)?;
        if kind == 0 && length == 0 && flags & FLAG_DONE != 0 { Ok(()) } else { Err(self.refused(kind, length)) }
    }

    fn chunk(&mut self) -> io::Result<(u16, u16, u32)> {
        let magic = self.u32()?;
        self.chunk_after(magic)
    }

    fn chunk_after(&mut self, magic: u32) -> io::Result<(u16, u16, u32)> {
        if magic != STRUCTURED_REPLY {
            return Err(broken("no structured reply"));
        }
        let kinds = self.u32()?;
        let (cookie, length) = (self.u64()?, self.u32()?);
        if cookie != self.cookie {
            return Err(broken("an answer to something else"));
        }
        Ok(((kinds >> 16) as u16, kinds as u16, length))
    }

    /// The error in an error chunk. The connection is of no use after it, as
    /// the rest of the answer is not read.
    fn refused(&mut self, kind: u16, length: u32) -> io::Error {
        if kind & CHUNK_ERROR == 0 || length < 6 {
            return broken("an unknown chunk");
        }
        match self.bytes(length) {
            Ok(data) => errno(u32::from_be_bytes([data[0], data[1], data[2], data[3]])),
            Err(error) => error,
        }
    }

    fn u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.stream.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn u64(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.stream.read_exact(&mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    fn bytes(&mut self, length: u32) -> io::Result<Vec<u8>> {
        let length = length as usize;
        if length > LIMIT {
            return Err(broken("too much"));
        }
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.request(CMD_DISCONNECT, 0, 0);
    }
}

/// Where `count` bytes from `start` lie in a buffer of `length` from `offset`.
fn place(start: u64, offset: u64, length: usize, count: u64) -> io::Result<usize> {
    let at = start.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
    let end = at.and_then(|at| usize::try_from(count).ok().and_then(|count| at.checked_add(count)));
    match (at, end) {
        (Some(at), Some(end)) if end <= length => Ok(at),
        _ => Err(broken("bytes from elsewhere")),
    }
}

fn append(to: &mut Vec<Stretch>, from: &[Stretch], mut limit: u64) {
    for &(length, flags) in from {
        let length = length.min(limit);
        limit -= length;
        if length > 0 {
            to.push((length, flags));
        }
    }
}

/// The protocol's error numbers are Linux's.
fn errno(number: u32) -> io::Error {
    i32::try_from(number).map_or_else(|_| broken("an unknown error"), io::Error::from_raw_os_error)
}

/// The error for a disk that cannot be read or written through NBD.
pub(crate) fn failed(what: &str, error: io::Error) -> Error {
    Error::new(Code::Failed, what.to_owned()).because(error)
}

pub use crate::export::{Access, Export};

/// Result of connecting, for callers that only need kiln's errors.
pub(crate) fn connect(stream: UnixStream) -> Result<Client> {
    Client::new(stream).map_err(|error| failed("the disk's NBD server did not answer", error))
}
