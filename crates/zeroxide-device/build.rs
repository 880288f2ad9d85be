//! Puts the kernels' sources into the library, so that a wheel is all that a user needs.
#![expect(
    clippy::disallowed_methods,
    reason = "cargo tells a build script its folders by the environment"
)]

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// Files of `folder` and below that end with one of `endings`, in order; the folder is watched for others.
fn files(folder: &Path, endings: &[&str]) -> Vec<PathBuf> {
    println!("cargo::rerun-if-changed={}", folder.display());
    let mut found = Vec::new();
    let entries =
        fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for entry in entries {
        let path = entry
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
            .path();
        if path.is_dir() {
            found.extend(files(&path, endings));
        } else if path
            .extension()
            .is_some_and(|ending| endings.iter().any(|each| ending == *each))
        {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// A table of names and texts.
fn table(name: &str, entries: impl Iterator<Item = (String, PathBuf)>) -> String {
    let mut text = format!("static {name}: &[(&str, &str)] = &[\n");
    for (name, path) in entries {
        writeln!(
            text,
            "    ({name:?}, include_str!({:?})),",
            path.display().to_string()
        )
        .expect("a string takes all");
    }
    text + "];\n"
}

fn main() {
    let variable = |name| env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
    let root = Path::new(&variable("CARGO_MANIFEST_DIR")).join("../../cuda");
    let (kernels, include) = (root.join("kernels"), root.join("include"));
    let sources = files(&kernels, &["cu"]).into_iter().map(|path| {
        let name = path.file_stem().expect("a file has a name");
        (name.to_string_lossy().into_owned(), path)
    });
    let headers = files(&include, &["cuh", "h"]).into_iter().map(|path| {
        let name = path.strip_prefix(&include).expect("it was found there");
        (name.to_string_lossy().into_owned(), path.clone())
    });
    let text = table("SOURCES", sources) + &table("HEADERS", headers);
    let target = Path::new(&variable("OUT_DIR")).join("sources.rs");
    fs::write(target, text).expect("cargo's folder can be written");
}
