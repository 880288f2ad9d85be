//! Text that says of itself whether it is whole: one line that identifies it, with its format version and the CRC-64/NVME
//! of the rest, and then JSON.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::checksums::checksum;

/// The text of `value` after a first line that begins with `magic`.
pub(super) fn seal<T: Serialize>(magic: &str, value: &T) -> Result<String, String> {
    let body = serde_json::to_string(value).map_err(|error| error.to_string())?;
    Ok(format!(
        "{magic}{:016x}\n{body}\n",
        checksum(body.as_bytes())
    ))
}

/// What [`seal`] has made text of, or why these bytes are none.
pub(super) fn unseal<T: DeserializeOwned>(magic: &str, bytes: &[u8]) -> Result<T, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
    let (first, body) = text.split_once('\n').ok_or("it has no first line")?;
    let sum = first
        .strip_prefix(magic)
        .ok_or_else(|| format!("it does not begin with {magic:?}"))?;
    let expected = u64::from_str_radix(sum, 16).map_err(|_| "its checksum is not a number")?;
    let body = body.strip_suffix('\n').ok_or("it is cut short")?;
    let got = checksum(body.as_bytes());
    if got != expected {
        return Err(format!("its checksum is {got:016x}, not {expected:016x}"));
    }
    serde_json::from_str(body).map_err(|error| error.to_string())
}
