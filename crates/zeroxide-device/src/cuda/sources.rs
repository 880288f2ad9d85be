//! The kernels' sources, which every build carries.

use super::compile::Source;

include!(concat!(env!("OUT_DIR"), "/sources.rs"));

/// Names of all sources, without `.cu`, in order.
pub fn names() -> impl Iterator<Item = &'static str> {
    SOURCES.iter().map(|(name, _)| *name)
}

/// Name and text of what the sources include.
pub fn headers() -> &'static [(&'static str, &'static str)] {
    HEADERS
}

/// A source with all that it may include.
pub fn source(name: &str) -> Option<Source> {
    let (_, text) = SOURCES.iter().find(|(each, _)| *each == name)?;
    Some(Source {
        name: format!("{name}.cu"),
        text: (*text).to_owned(),
        headers: HEADERS
            .iter()
            .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
            .collect(),
    })
}
