//! The block map as a blob. See *Block map* in `docs/image-format.md`.
//!
//! One JSON line, then a bitmap of the blocks that are stored (bit `i % 8` of
//! byte `i / 8`), then for each of those 44 bytes: 32 of digest, and pack,
//! offset and length as little-endian 32-bit numbers. A map has exactly one
//! such form, and nothing else is accepted: what is read comes from outside.

use kiln_disk::pack::SIZE_LIMIT;
use kiln_disk::packs::{FRAME_LIMIT, PACK_LIMIT};
use kiln_model::Digest;
use kiln_model::block::BLOCK;
use kiln_model::error::{Code, Error, Result, ResultExt};
use kiln_model::image::{Block, BlockMap, PackRef, Place, zero_block};
use serde::{Deserialize, Serialize};

const FORMAT: &str = "kiln-blockmap-v1";

/// Bytes of a stored block in the table.
const ROW: usize = 44;

/// Most bytes of the first line: room for some 4,000 packs.
const HEADER_LIMIT: usize = 512 * 1024;

/// Most bytes of a map: a full disk of [`SIZE_LIMIT`].
pub(crate) const MAP_LIMIT: u64 = HEADER_LIMIT as u64 + SIZE_LIMIT / BLOCK * (ROW as u64 + 1);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: String,
    size: u64,
    block: u64,
    packs: Vec<PackRef>,
}

/// The one form of a map as bytes.
///
/// # Errors
/// When the map contradicts itself.
pub fn encode(map: &BlockMap) -> Result<Vec<u8>> {
    let header = Header { format: FORMAT.into(), size: map.size, block: BLOCK, packs: map.packs.clone() };
    let mut bytes = serde_json::to_vec(&header).trying(|| "write a block map".into())?;
    bytes.push(b'\n');
    let bitmap = bytes.len();
    bytes.resize(bitmap + map.blocks.len().div_ceil(8), 0);
    for (index, block) in map.blocks.iter().enumerate() {
        if let Place::Pack { pack, offset, length } = block.place {
            bytes[bitmap + index / 8] |= 1 << (index % 8);
            bytes.extend(block.digest.as_bytes());
            for number in [pack, offset, length] {
                bytes.extend(number.to_le_bytes());
            }
        }
    }
    // What could not be read back must not be written either.
    let back = decode(&bytes).map_err(|error| Error::new(Code::Failed, "a block map contradicts itself").because(error))?;
    if back == *map { Ok(bytes) } else { Err(Error::new(Code::Failed, "a block map contradicts itself")) }
}

/// Reads a map; accepts nothing but what [`encode`] gives.
///
/// # Errors
/// [`Code::Corrupt`] with what is wrong.
pub fn decode(bytes: &[u8]) -> Result<BlockMap> {
    parse(bytes).map_err(|why| Error::new(Code::Corrupt, format!("this is not a block map that kiln reads: {why}")))
}

fn parse(bytes: &[u8]) -> Result<BlockMap, String> {
    let end = bytes.iter().take(HEADER_LIMIT).position(|byte| *byte == b'\n').ok_or("it has no first line")?;
    let (line, rest) = (&bytes[..end], &bytes[end + 1..]);
    let header: Header = serde_json::from_slice(line).map_err(|error| format!("its first line: {error}"))?;
    if header.format != FORMAT || header.block != BLOCK {
        return Err(format!("its format is `{}` with blocks of {}", header.format, header.block));
    }
    if header.size > SIZE_LIMIT {
        return Err(format!("a disk of {} bytes is too large", header.size));
    }
    if serde_json::to_vec(&header).map_err(|error| error.to_string())? != line {
        return Err("its first line is not in the one form it may have".into());
    }
    check_packs(&header.packs)?;
    let count = usize::try_from(header.size.div_ceil(BLOCK)).map_err(|error| error.to_string())?;
    let (bitmap, table) = rest.split_at_checked(count.div_ceil(8)).ok_or("it ends in its bitmap")?;
    let stored: usize = bitmap.iter().map(|byte| byte.count_ones() as usize).sum();
    if table.len() != stored * ROW {
        return Err(format!("its table has {} bytes and should have {}", table.len(), stored * ROW));
    }
    if !count.is_multiple_of(8) && bitmap.last().is_some_and(|last| last >> (count % 8) != 0) {
        return Err("its bitmap has blocks after the disk's end".into());
    }
    let mut rows = table.chunks_exact(ROW);
    let mut blocks = Vec::with_capacity(count);
    // Packs are listed by first use, so a new one is always the next.
    let mut seen = 0;
    for index in 0..count {
        if bitmap[index / 8] >> (index % 8) & 1 == 0 {
            blocks.push(Block { digest: zero_block(), place: Place::Zero });
            continue;
        }
        let block = rows.next().and_then(row).ok_or("it ends in its table")?;
        if let Place::Pack { pack, offset, length } = block.place {
            let size = header.packs.get(pack as usize).map(|p| p.size).ok_or(format!("block {index} is in a pack that is not listed"))?;
            if pack > seen {
                return Err("its packs are not in the order of first use".into());
            }
            seen = seen.max(pack + 1);
            if length == 0 || length > FRAME_LIMIT || u64::from(offset) + u64::from(length) > size {
                return Err(format!("block {index} lies outside of its pack"));
            }
        }
        if block.digest == zero_block() {
            return Err(format!("block {index} is zero, and stored"));
        }
        blocks.push(block);
    }
    if seen as usize != header.packs.len() {
        return Err("it lists packs that no block is in".into());
    }
    Ok(BlockMap { size: header.size, packs: header.packs, blocks })
}

fn check_packs(packs: &[PackRef]) -> Result<(), String> {
    let mut digests = std::collections::HashSet::new();
    for pack in packs {
        if pack.size == 0 || pack.size > PACK_LIMIT {
            return Err(format!("pack {} cannot have {} bytes", pack.digest, pack.size));
        }
        if !digests.insert(pack.digest) {
            return Err(format!("pack {} is listed twice", pack.digest));
        }
    }
    Ok(())
}

fn row(bytes: &[u8]) -> Option<Block> {
    let (digest, rest) = bytes.split_first_chunk::<32>()?;
    let (pack, rest) = rest.split_first_chunk::<4>()?;
    let (offset, rest) = rest.split_first_chunk::<4>()?;
    let length = rest.first_chunk::<4>()?;
    let [pack, offset, length] = [pack, offset, length].map(|bytes| u32::from_le_bytes(*bytes));
    Some(Block { digest: Digest::from_bytes(*digest), place: Place::Pack { pack, offset, length } })
}

#[cfg(test)]
#[path = "blockmap_tests.rs"]
mod tests;
