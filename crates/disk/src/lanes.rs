//! SHA-256 of several messages at once.
//!
//! A single SHA-256 is one long chain: each round needs the one before, and no
//! vector unit helps much. Blocks are independent of each other, so eight of
//! them go side by side, each in its own lane of 32 bits of a vector register:
//!
//! ```text
//!  block 0  ▓▓▓▓ ─┐        ┌ word 0 of block 0 … 7 ┐
//!  block 1  ▓▓▓▓ ─┤  turn  │ word 1 of block 0 … 7 │   64 rounds on all eight
//!     …           ├──────► │           …           ├──► at the price of about
//!  block 7  ▓▓▓▓ ─┘        └ word 15               ┘   one and a half
//! ```
//!
//! That is done with AVX2, better with AVX-512 (its rotations and three-way
//! logic on registers of 256 bits, which do not slow the clock). A CPU with
//! instructions for SHA-256 is faster with those, one message at a time, and
//! any other has to do without; there the crate `sha2` does it all. It also
//! digests what is left at the end of each message everywhere.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use kiln_model::Digest;
use sha2::block_api::compress256;

/// Messages that are digested side by side.
pub const LANES: usize = 8;

/// How much of each file is read at once, in bytes.
const CHUNK: usize = 64 * 1024;

/// Added to [`CHUNK`], so that the lanes' buffers do not fall into the same
/// sets of the cache.
const STAGGER: usize = 576;

/// SHA-256's state: eight words.
type State = [u32; 8];

/// FIPS 180-4, 5.3.3.
const START: State = [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

/// FIPS 180-4, 4.2.2.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const K: [u32; 64] = [
    0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5,
    0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174,
    0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da,
    0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967,
    0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13, 0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85,
    0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070,
    0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3,
    0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2,
];

/// How many messages are best digested at once: [`LANES`], or 1 where it makes
/// no difference.
pub fn at_once() -> usize {
    if Kernel::best().is_some() { LANES } else { 1 }
}

/// The digest of each message, in order. Fastest when [`LANES`] neighbours are
/// of one length.
pub fn digests(messages: &[&[u8]]) -> Vec<Digest> {
    digests_with(Kernel::best(), messages)
}

fn digests_with(kernel: Option<Kernel>, messages: &[&[u8]]) -> Vec<Digest> {
    let mut all = Vec::with_capacity(messages.len());
    for group in messages.chunks(LANES) {
        let together = group.iter().map(|message| message.len()).min().unwrap_or(0) / 64 * 64;
        let mut states = [START; LANES];
        let heads: Vec<&[u8]> = group.iter().map(|message| &message[..together]).collect();
        advance(kernel, &mut states[..group.len()], &heads);
        for (state, message) in states.iter().zip(group) {
            all.push(finish(*state, &message[together..], message.len() as u64));
        }
    }
    all
}

/// The digest and the length in bytes of each file, from its first byte to its
/// last, whatever its position; or why one could not be read. Takes 64 KiB of
/// memory for each of [`LANES`].
pub fn digests_of_files(files: &[&File]) -> Vec<io::Result<(Digest, u64)>> {
    files.chunks(LANES).flat_map(|group| files_with(Kernel::best(), group)).collect()
}

/// One group of files. All are at the same place until they end.
fn files_with(kernel: Option<Kernel>, files: &[&File]) -> Vec<io::Result<(Digest, u64)>> {
    let mut done: Vec<Option<io::Result<(Digest, u64)>>> = files.iter().map(|_| None).collect();
    let mut buffer = vec![0; files.len() * (CHUNK + STAGGER)];
    let mut states = [START; LANES];
    for at in (0..).step_by(CHUNK) {
        let mut data: Vec<&[u8]> = Vec::with_capacity(files.len());
        let mut whole = Vec::with_capacity(files.len());
        for (number, part) in buffer.chunks_mut(CHUNK + STAGGER).enumerate() {
            if done[number].is_some() {
                continue;
            }
            let part = &mut part[..CHUNK];
            match read_full(files[number], part, at) {
                Ok(CHUNK) => {
                    data.push(part);
                    whole.push(number);
                }
                Ok(length) => {
                    let size = at + length as u64;
                    done[number] = Some(Ok((finish(states[number], &part[..length], size), size)));
                }
                Err(error) => done[number] = Some(Err(error)),
            }
        }
        if whole.is_empty() {
            break;
        }
        let mut moving: Vec<State> = whole.iter().map(|number| states[*number]).collect();
        advance(kernel, &mut moving, &data);
        for (number, state) in whole.iter().zip(moving) {
            states[*number] = state;
        }
    }
    done.into_iter().flatten().collect()
}

/// Fills `buffer`, except at the file's end; gives how much.
fn read_full(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Takes each state further by its data. All data are of one length, a
/// multiple of 64; there are at most [`LANES`].
fn advance(kernel: Option<Kernel>, states: &mut [State], data: &[&[u8]]) {
    match (kernel, data.first()) {
        // Two lanes of eight cost about as much as two messages by themselves.
        (Some(kernel), Some(first)) if data.len() > 2 => {
            // Lanes without a message do somebody else's work again.
            let (mut all, mut rows) = ([START; LANES], [*first; LANES]);
            for (lane, (state, data)) in states.iter().zip(data).enumerate() {
                (all[lane], rows[lane]) = (*state, *data);
            }
            kernel.compress(&mut all, &rows);
            states.copy_from_slice(&all[..states.len()]);
        }
        _ => states.iter_mut().zip(data).for_each(|(state, data)| compress256(state, data.as_chunks().0)),
    }
}

/// The digest of a message of `length` bytes, of which `state` has taken all
/// but the `rest`.
fn finish(mut state: State, rest: &[u8], length: u64) -> Digest {
    let (rows, rest) = rest.as_chunks::<64>();
    compress256(&mut state, rows);
    let mut last = [0; 128];
    last[..rest.len()].copy_from_slice(rest);
    last[rest.len()] = 0x80;
    let end = if rest.len() < 56 { 64 } else { 128 };
    last[end - 8..end].copy_from_slice(&(length * 8).to_be_bytes());
    compress256(&mut state, last[..end].as_chunks().0);
    let mut bytes = [0; 32];
    for (bytes, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(state) {
        *bytes = word.to_be_bytes();
    }
    Digest::from_bytes(bytes)
}

/// A way to compress eight messages at once that this CPU has.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
struct Kernel(Features);

#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy)]
enum Features {
    Avx2,
    Avx512,
}

#[cfg(target_arch = "x86_64")]
impl Kernel {
    /// The one to use, if any is better than one message after the other.
    fn best() -> Option<Self> {
        let alone = is_x86_feature_detected!("sha") && is_x86_feature_detected!("sse4.1");
        if alone { None } else { Self::avx512().or_else(Self::avx2) }
    }

    fn avx2() -> Option<Self> {
        is_x86_feature_detected!("avx2").then_some(Self(Features::Avx2))
    }

    fn avx512() -> Option<Self> {
        let there = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl");
        there.then_some(Self(Features::Avx512))
    }

    /// Takes each state further by its data, as far as the shortest goes.
    #[allow(unsafe_code, reason = "the only way from code for every CPU to code for some; what it calls is safe code")]
    fn compress(self, states: &mut [State; LANES], data: &[&[u8]; LANES]) {
        match self.0 {
            // SAFETY: only `Kernel::avx2` makes this value, after it has found
            // the CPU to have all features that `avx2::compress` names.
            Features::Avx2 => unsafe { avx2::compress(states, data) },
            // SAFETY: only `Kernel::avx512` makes this value, likewise.
            Features::Avx512 => unsafe { avx512::compress(states, data) },
        }
    }
}

/// There is none for this kind of CPU.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Debug, Clone, Copy)]
enum Kernel {}

#[cfg(not(target_arch = "x86_64"))]
impl Kernel {
    fn best() -> Option<Self> {
        None
    }

    fn compress(self, _: &mut [State; LANES], _: &[&[u8]; LANES]) {
        match self {}
    }
}

/// One round of all lanes. It changes two words; then the names move on instead
/// of the words.
#[cfg(target_arch = "x86_64")]
macro_rules! round {
    ($k:expr, $w:ident, $i:literal, $a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident) => {
        let k = _mm256_set1_epi32($k[$i].cast_signed());
        let s1 = xor(rotate::<6, 26>($e), rotate::<11, 21>($e), rotate::<25, 7>($e));
        let t = add(add($h, add(k, $w[$i])), add(s1, choose($e, $f, $g)));
        let s0 = xor(rotate::<2, 30>($a), rotate::<13, 19>($a), rotate::<22, 10>($a));
        $d = add($d, t);
        $h = add(t, add(s0, majority($a, $b, $c)));
    };
}

/// Sixteen rounds, which use up the words `w`.
#[cfg(target_arch = "x86_64")]
macro_rules! rounds {
    ($k:expr, $w:ident, $a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident) => {
        round!($k, $w, 0, $a $b $c $d $e $f $g $h);
        round!($k, $w, 1, $h $a $b $c $d $e $f $g);
        round!($k, $w, 2, $g $h $a $b $c $d $e $f);
        round!($k, $w, 3, $f $g $h $a $b $c $d $e);
        round!($k, $w, 4, $e $f $g $h $a $b $c $d);
        round!($k, $w, 5, $d $e $f $g $h $a $b $c);
        round!($k, $w, 6, $c $d $e $f $g $h $a $b);
        round!($k, $w, 7, $b $c $d $e $f $g $h $a);
        round!($k, $w, 8, $a $b $c $d $e $f $g $h);
        round!($k, $w, 9, $h $a $b $c $d $e $f $g);
        round!($k, $w, 10, $g $h $a $b $c $d $e $f);
        round!($k, $w, 11, $f $g $h $a $b $c $d $e);
        round!($k, $w, 12, $e $f $g $h $a $b $c $d);
        round!($k, $w, 13, $d $e $f $g $h $a $b $c);
        round!($k, $w, 14, $c $d $e $f $g $h $a $b);
        round!($k, $w, 15, $b $c $d $e $f $g $h $a);
    };
}

/// The next sixteen words.
#[cfg(target_arch = "x86_64")]
macro_rules! extend {
    ($w:ident, $($i:literal)*) => {$(
        let (x, y) = ($w[($i + 1) % 16], $w[($i + 14) % 16]);
        let s0 = xor(rotate::<7, 25>(x), rotate::<18, 14>(x), _mm256_srli_epi32::<3>(x));
        let s1 = xor(rotate::<17, 15>(y), rotate::<19, 13>(y), _mm256_srli_epi32::<10>(y));
        $w[$i] = add(add($w[$i], s0), add($w[($i + 9) % 16], s1));
    )*};
}

/// One kernel: the same rounds for each set of features, which differ in how
/// they rotate and combine.
#[cfg(target_arch = "x86_64")]
macro_rules! kernel {
    (
        $name:ident, $features:literal,
        rotate<$right:ident, $left:ident>($x:ident) $rotate:block,
        xor($x1:ident, $y1:ident, $z1:ident) $xor:block,
        choose($x2:ident, $y2:ident, $z2:ident) $choose:block,
        majority($x3:ident, $y3:ident, $z3:ident) $majority:block,
    ) => {
        mod $name {
            use std::arch::x86_64::*;

            use super::{K, LANES, State};

            /// Rotates each lane right. The number of bits is given both ways.
            #[target_feature(enable = $features)]
            #[inline]
            fn rotate<const $right: i32, const $left: i32>($x: __m256i) -> __m256i $rotate

            #[target_feature(enable = $features)]
            #[inline]
            fn xor($x1: __m256i, $y1: __m256i, $z1: __m256i) -> __m256i $xor

            #[target_feature(enable = $features)]
            #[inline]
            fn choose($x2: __m256i, $y2: __m256i, $z2: __m256i) -> __m256i $choose

            #[target_feature(enable = $features)]
            #[inline]
            fn majority($x3: __m256i, $y3: __m256i, $z3: __m256i) -> __m256i $majority

            #[target_feature(enable = $features)]
            #[inline]
            fn add(x: __m256i, y: __m256i) -> __m256i {
                _mm256_add_epi32(x, y)
            }

            /// Eight words in the order of memory.
            #[target_feature(enable = $features)]
            #[inline]
            fn load(bytes: &[u8; 32]) -> __m256i {
                let (words, _) = bytes.as_chunks::<8>();
                let word = |n: usize| i64::from_le_bytes(words[n]);
                _mm256_setr_epi64x(word(0), word(1), word(2), word(3))
            }

            /// Turns eight rows of eight words: word `i` of row `j` becomes
            /// word `j` of row `i`.
            #[target_feature(enable = $features)]
            #[inline]
            fn turn(rows: [__m256i; 8]) -> [__m256i; 8] {
                let [a, b, c, d, e, f, g, h] = rows;
                let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
                let (ef, gh) = (_mm256_unpacklo_epi32(e, f), _mm256_unpacklo_epi32(g, h));
                let (ab2, cd2) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
                let (ef2, gh2) = (_mm256_unpackhi_epi32(e, f), _mm256_unpackhi_epi32(g, h));
                let (a, b) = (_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
                let (c, d) = (_mm256_unpacklo_epi64(ab2, cd2), _mm256_unpackhi_epi64(ab2, cd2));
                let (e, f) = (_mm256_unpacklo_epi64(ef, gh), _mm256_unpackhi_epi64(ef, gh));
                let (g, h) = (_mm256_unpacklo_epi64(ef2, gh2), _mm256_unpackhi_epi64(ef2, gh2));
                [
                    _mm256_permute2x128_si256::<0x20>(a, e),
                    _mm256_permute2x128_si256::<0x20>(b, f),
                    _mm256_permute2x128_si256::<0x20>(c, g),
                    _mm256_permute2x128_si256::<0x20>(d, h),
                    _mm256_permute2x128_si256::<0x31>(a, e),
                    _mm256_permute2x128_si256::<0x31>(b, f),
                    _mm256_permute2x128_si256::<0x31>(c, g),
                    _mm256_permute2x128_si256::<0x31>(d, h),
                ]
            }

            /// Half of the message's words, from big-endian bytes.
            #[target_feature(enable = $features)]
            #[inline]
            fn words(rows: &[&[u8; 64]; LANES], half: usize) -> [__m256i; 8] {
                let swap = _mm256_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203, 0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
                let row = |n: usize| _mm256_shuffle_epi8(load(&rows[n].as_chunks().0[half]), swap);
                turn([row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7)])
            }

            #[target_feature(enable = $features)]
            #[inline]
            fn unload(row: __m256i) -> State {
                [
                    _mm256_extract_epi32::<0>(row).cast_unsigned(),
                    _mm256_extract_epi32::<1>(row).cast_unsigned(),
                    _mm256_extract_epi32::<2>(row).cast_unsigned(),
                    _mm256_extract_epi32::<3>(row).cast_unsigned(),
                    _mm256_extract_epi32::<4>(row).cast_unsigned(),
                    _mm256_extract_epi32::<5>(row).cast_unsigned(),
                    _mm256_extract_epi32::<6>(row).cast_unsigned(),
                    _mm256_extract_epi32::<7>(row).cast_unsigned(),
                ]
            }

            /// Takes each state further by its data, as far as the shortest goes.
            #[target_feature(enable = $features)]
            pub(super) fn compress(states: &mut [State; LANES], data: &[&[u8]; LANES]) {
                let data = data.map(|data| data.as_chunks::<64>().0);
                let rows = data.iter().map(|rows| rows.len()).min().unwrap_or(0);
                let mut state = turn(states.map(|s| {
                    let s = s.map(u32::cast_signed);
                    _mm256_setr_epi32(s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7])
                }));
                for row in 0..rows {
                    let rows = data.map(|rows| &rows[row]);
                    let [w0, w1, w2, w3, w4, w5, w6, w7] = words(&rows, 0);
                    let [w8, w9, w10, w11, w12, w13, w14, w15] = words(&rows, 1);
                    let mut w = [w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, w10, w11, w12, w13, w14, w15];
                    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = state;

                    let (k, _) = K.as_chunks::<16>();
                    rounds!(k[0], w, a b c d e f g h);
                    for k in &k[1..] {
                        extend!(w, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
                        rounds!(k, w, a b c d e f g h);
                    }
                    let [a0, b0, c0, d0, e0, f0, g0, h0] = state;
                    state = [add(a0, a), add(b0, b), add(c0, c), add(d0, d), add(e0, e), add(f0, f), add(g0, g), add(h0, h)];
                }
                *states = turn(state).map(|row| unload(row));
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernel! {
    avx2, "avx2",
    rotate<RIGHT, LEFT>(x) { _mm256_or_si256(_mm256_srli_epi32::<RIGHT>(x), _mm256_slli_epi32::<LEFT>(x)) },
    xor(x, y, z) { _mm256_xor_si256(_mm256_xor_si256(x, y), z) },
    choose(x, y, z) { _mm256_xor_si256(z, _mm256_and_si256(x, _mm256_xor_si256(y, z))) },
    // `y ^ z` here was `x ^ y` in the round before: the compiler sees it.
    majority(x, y, z) { _mm256_xor_si256(y, _mm256_and_si256(_mm256_xor_si256(x, y), _mm256_xor_si256(y, z))) },
}

#[cfg(target_arch = "x86_64")]
kernel! {
    avx512, "avx2,avx512f,avx512bw,avx512vl",
    rotate<RIGHT, LEFT>(x) { _mm256_ror_epi32::<RIGHT>(x) },
    // The numbers are the tables of truth.
    xor(x, y, z) { _mm256_ternarylogic_epi32::<0x96>(x, y, z) },
    choose(x, y, z) { _mm256_ternarylogic_epi32::<0xca>(x, y, z) },
    majority(x, y, z) { _mm256_ternarylogic_epi32::<0xe8>(x, y, z) },
}

#[cfg(test)]
#[path = "lanes_tests.rs"]
mod tests;
