//! What the process really uses, as the kernel counts it.
#![expect(unsafe_code, reason = "drops pages of file mappings")]

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};

use crate::map::drop_file_pages;

/// Resident memory of the process, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Resident {
    /// All resident memory (`VmRSS`).
    pub rss: u64,
    /// Anonymous memory: payload, heap, stacks (`RssAnon`).
    pub anon: u64,
    /// Files and shared memory: libraries, page-cache mappings (`RssFile` + `RssShmem`).
    pub file: u64,
    /// The highest `rss` since the process began or [`reset_peak`] was called last, by whomever (`VmHWM`).
    pub peak: u64,
}

/// Resident memory of this process, from `/proc/self/status`.
///
/// # Errors
/// When the file cannot be read or lacks a field.
pub fn resident_bytes() -> io::Result<Resident> {
    parse_status(BufReader::new(File::open("/proc/self/status")?))
}

/// Makes the present resident memory the peak, for everybody who asks the kernel after this process: other tools that
/// look at `VmHWM` or `ru_maxrss` see it, too.
///
/// # Errors
/// Where the kernel or a sandbox does not allow it.
pub fn reset_peak() -> io::Result<()> {
    // See proc_pid_clear_refs(5): 5 touches nothing but the peak.
    OpenOptions::new()
        .write(true)
        .open("/proc/self/clear_refs")?
        .write_all(b"5")
}

/// Drops the pages of program text and of libraries' constants from the resident set: those touched only while
/// modules were imported. What is needed again comes back from the page cache by a minor fault. Returns the bytes
/// dropped.
///
/// Only private file mappings that are not writable are touched, executable ones and those of shared libraries, and of
/// these only the ones in which the kernel counts no anonymous page: no byte of them differs from the file.
///
/// Call it while no other thread loads or unloads libraries: a mapping is looked up first and dropped
/// after.
///
/// # Errors
/// When the kernel's list of mappings cannot be read, or a mapping cannot be dropped.
pub fn drop_clean_text() -> io::Result<u64> {
    let mappings = clean_text(BufReader::new(File::open("/proc/self/smaps")?))?;
    let mut dropped = 0;
    for text in mappings {
        // SAFETY: `clean_text` returns private file mappings without modified pages; that they stay so
        // until here is asked of the caller.
        unsafe { drop_file_pages(text.start, text.len) }?;
        dropped += text.resident;
    }
    Ok(dropped)
}

fn parse_status(status: impl BufRead) -> io::Result<Resident> {
    let mut fields = [None; 5];
    for line in status.lines() {
        let line = line?;
        for (name, value) in ["VmRSS:", "RssAnon:", "RssFile:", "RssShmem:", "VmHWM:"]
            .iter()
            .zip(&mut fields)
        {
            if let Some(rest) = line.strip_prefix(name) {
                *value = Some(kib(rest)?);
            }
        }
    }
    match fields {
        [Some(rss), Some(anon), Some(file), Some(shared), Some(peak)] => Ok(Resident {
            rss,
            anon,
            file: file + shared,
            peak,
        }),
        _ => Err(invalid(
            "/proc/self/status",
            "VmRSS, RssAnon, RssFile, RssShmem or VmHWM is missing",
        )),
    }
}

/// A text mapping that holds nothing but what its file holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct CleanText {
    start: usize,
    len: usize,
    resident: u64,
}

/// One line of `smaps`.
enum Line<'a> {
    /// Starts a private, not writable mapping of an existing program or library.
    Text(CleanText),
    /// Starts a mapping of any other kind.
    Other,
    /// A field of the mapping started last.
    Field(&'a str, &'a str),
}

fn clean_text(smaps: impl BufRead) -> io::Result<Vec<CleanText>> {
    let mut found = Vec::new();
    // The text mapping whose fields are being read.
    let mut current: Option<CleanText> = None;
    for line in smaps.lines() {
        let line = line?;
        match parse_line(&line)? {
            Line::Text(text) => current = Some(text),
            Line::Other => current = None,
            Line::Field(name, value) => {
                let Some(text) = &mut current else { continue };
                match name {
                    "Rss" => text.resident = kib(value)?,
                    "Anonymous" if kib(value)? > 0 => current = None,
                    // The last field of a mapping. Locked and huge-page mappings cannot be dropped.
                    "VmFlags" => {
                        let fixed = value
                            .split_whitespace()
                            .any(|flag| ["lo", "ht", "pf"].contains(&flag));
                        found.extend(current.take().filter(|text| text.resident > 0 && !fixed));
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(found)
}

fn parse_line(line: &str) -> io::Result<Line<'_>> {
    let mut words = line.split_whitespace();
    let (range, mode) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    if range.ends_with(':') {
        return Ok(line
            .split_once(':')
            .map_or(Line::Other, |(name, value)| Line::Field(name, value)));
    }
    let path = words.nth(3).unwrap_or("");
    let text = mode == "r-xp" || (mode == "r--p" && path.contains(".so"));
    if !text || !path.starts_with('/') || line.ends_with("(deleted)") {
        return Ok(Line::Other);
    }
    let address = |text| usize::from_str_radix(text, 16).ok();
    let bounds = range
        .split_once('-')
        .and_then(|(start, end)| Some((address(start)?, address(end)?)));
    let (start, end) = bounds.ok_or_else(|| invalid("/proc/self/smaps", line))?;
    Ok(Line::Text(CleanText {
        start,
        len: end - start,
        resident: 0,
    }))
}

/// Bytes of a `123 kB` field.
fn kib(value: &str) -> io::Result<u64> {
    value
        .trim()
        .strip_suffix("kB")
        .and_then(|number| number.trim().parse::<u64>().ok())
        .map(|kib| kib * 1024)
        .ok_or_else(|| invalid("a size in /proc", value))
}

fn invalid(what: &str, text: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{what}: not understood: {text}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(header: &str, rss: u64, anonymous: u64, flags: &str) -> String {
        format!(
            "{header}\nSize: 64 kB\nRss: {rss:>10} kB\nAnonymous: {anonymous:>6} kB\n\
             AnonHugePages: 0 kB\nTHPeligible:           0\nVmFlags: {flags}\n"
        )
    }

    fn found(smaps: &str) -> Vec<(usize, usize, u64)> {
        let texts = clean_text(smaps.as_bytes()).unwrap();
        texts
            .into_iter()
            .map(|text| (text.start, text.len, text.resident))
            .collect()
    }

    #[test]
    fn only_clean_text_is_chosen() {
        let text = "1000-3000 r-xp 00001000 fe:00 247282    /usr/lib/lib with space.so";
        let flags = "rd ex mr mw me";
        assert_eq!(found(&mapping(text, 8, 0, flags)), [(0x1000, 0x2000, 8192)]);
        let refused = [
            mapping(text, 8, 4, flags),
            mapping(text, 0, 0, flags),
            mapping(text, 8, 0, "rd ex mr mw me lo"),
            mapping(
                "1000-3000 r-xp 0 fe:00 1 /usr/lib/a.so (deleted)",
                8,
                0,
                flags,
            ),
            mapping("1000-3000 r--p 0 fe:00 1 /usr/share/data", 8, 0, flags),
            mapping("1000-3000 rwxp 0 fe:00 1 /usr/lib/a.so", 8, 0, flags),
            mapping("1000-3000 r-xs 0 fe:00 1 /usr/lib/a.so", 8, 0, flags),
            mapping("1000-3000 r-xp 0 00:00 0 [vdso]", 8, 0, flags),
            mapping("1000-3000 r-xp 0 00:00 0", 8, 0, flags),
        ];
        for smaps in &refused {
            assert_eq!(found(smaps), [], "{smaps}");
            // What is refused must not lend its fields to the next mapping, nor hide it.
            let both = format!("{smaps}{}", mapping(text, 4, 0, flags));
            assert_eq!(found(&both), [(0x1000, 0x2000, 4096)], "{both}");
        }
    }

    #[test]
    fn status_fields_are_kibibytes() {
        let status = "Name:\tx\nVmHWM:\t 500 kB\nVmRSS:\t 400 kB\nRssAnon:\t 300 kB\n\
                      RssFile:\t 90 kB\nRssShmem:\t 10 kB\n";
        let expected = Resident {
            rss: 400 << 10,
            anon: 300 << 10,
            file: 100 << 10,
            peak: 500 << 10,
        };
        assert_eq!(parse_status(status.as_bytes()).unwrap(), expected);
        assert!(parse_status("VmRSS: 4 kB\n".as_bytes()).is_err());
        assert!(parse_status(status.replace(" 90 kB", " 90 MB").as_bytes()).is_err());
    }
}
