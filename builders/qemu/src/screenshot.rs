//! What a guest's screen shows, as a PNG.

use std::io::BufWriter;
use std::path::{Path, PathBuf};

use kiln_model::{Code, Error, Result, ResultExt as _};
use serde_json::json;

use crate::qmp::Qmp;

/// How many screenshots are kept; older ones are removed.
const KEPT: usize = 20;

/// The largest picture that is converted, in pixels.
const PIXELS: usize = 64 << 20;

/// Takes one, to a new file in `folder` whose name begins with `name`.
///
/// # Errors
/// When QEMU cannot take it or it cannot be written.
pub(crate) async fn take(qmp: &Qmp, folder: &Path, name: &str) -> Result<PathBuf> {
    crate::private::folder(folder).trying(|| format!("make {}", folder.display()))?;
    let path =
        (1..).map(|n| folder.join(format!("{name}-{n}.png"))).find(|path| !path.exists()).unwrap_or_else(|| folder.join("screen.png"));
    crate::private::write(&path, &[]).trying(|| format!("make {}", path.display()))?;
    let taken = match qmp.execute("screendump", json!({ "filename": path, "format": "png" })).await {
        Ok(_) => Ok(()),
        // QEMU before 7.1, or built without libpng: PPM is all it knows.
        Err(error) if error.kind() == Code::Failed => by_way_of_ppm(qmp, &path).await,
        Err(error) => Err(error),
    };
    if let Err(error) = taken {
        let _ = std::fs::remove_file(&path);
        return Err(error);
    }
    forget_old_ones(folder);
    Ok(path)
}

async fn by_way_of_ppm(qmp: &Qmp, path: &Path) -> Result<()> {
    let ppm = path.with_extension("ppm");
    crate::private::write(&ppm, &[]).trying(|| format!("make {}", ppm.display()))?;
    let taken = qmp.execute("screendump", json!({ "filename": ppm })).await;
    let bytes = std::fs::read(&ppm);
    let _ = std::fs::remove_file(&ppm);
    taken?;
    let bytes = bytes.trying(|| format!("read {}", ppm.display()))?;
    let (width, height, pixels) =
        parse_ppm(&bytes).ok_or_else(|| Error::new(Code::Failed, "QEMU's screenshot is not a picture that kiln knows"))?;
    encode(path, width, height, pixels).trying(|| format!("write {}", path.display()))
}

fn encode(path: &Path, width: u32, height: u32, pixels: &[u8]) -> std::result::Result<(), png::EncodingError> {
    let file = std::fs::File::create(path)?;
    let mut encoder = png::Encoder::new(BufWriter::new(file), width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()
}

/// The binary PPM that QEMU writes: `P6`, width, height, 255, one white space,
/// then three bytes for each pixel (ppm(5)).
fn parse_ppm(bytes: &[u8]) -> Option<(u32, u32, &[u8])> {
    let mut rest = bytes.strip_prefix(b"P6")?;
    let mut numbers = [0_u32; 3];
    for number in &mut numbers {
        let begin = rest.iter().position(|byte| !byte.is_ascii_whitespace())?;
        rest = &rest[begin..];
        let end = rest.iter().position(|byte| !byte.is_ascii_digit())?;
        *number = std::str::from_utf8(&rest[..end]).ok()?.parse().ok()?;
        rest = &rest[end..];
    }
    let [width, height, 255] = numbers else { return None };
    let count = usize::try_from(width).ok()?.checked_mul(usize::try_from(height).ok()?)?;
    if count == 0 || count > PIXELS {
        return None;
    }
    Some((width, height, rest.get(1..=count * 3)?))
}

fn forget_old_ones(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut all: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "png"))
        .filter_map(|path| Some((std::fs::metadata(&path).ok()?.modified().ok()?, path)))
        .collect();
    all.sort();
    let excess = all.len().saturating_sub(KEPT);
    for (_, path) in all.into_iter().take(excess) {
        let _ = std::fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_parsed_and_written() {
        let ppm = b"P6\n2 1\n255\n\x01\x02\x03\x04\x05\x06";
        let (width, height, pixels) = parse_ppm(ppm).unwrap();
        assert_eq!((width, height, pixels), (2, 1, &[1, 2, 3, 4, 5, 6][..]));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.png");
        encode(&path, width, height, pixels).unwrap();
        assert!(std::fs::read(path).unwrap().starts_with(b"\x89PNG"));
    }

    #[test]
    fn nothing_else_is() {
        for wrong in [
            &b""[..],
            b"P6",
            b"P6 2 1 255\n\x01",
            b"P5 1 1 255\n\x01\x01\x01",
            b"P6 99999 99999 255\n",
            b"P6 0 0 255\n",
            b"P6 1 1 70000\nxxx",
        ] {
            assert_eq!(parse_ppm(wrong), None);
        }
    }

    #[test]
    fn only_so_many_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        for n in 0..KEPT + 5 {
            std::fs::write(folder.path().join(format!("{n}.png")), b"x").unwrap();
        }
        forget_old_ones(folder.path());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), KEPT);
    }
}
