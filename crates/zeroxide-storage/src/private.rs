//! Files and directories that nobody but their owner can look into, whatever the umask says: they hold weights and
//! optimizer state, often on a drive that many people share.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

const FILE: u32 = 0o600;
const DIRECTORY: u32 = 0o700;

/// A new file, open for reading and writing, in the place of any other. One that is there is replaced rather than
/// emptied: somebody may have it open.
pub(crate) fn create_file(path: &Path) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    open(OpenOptions::new().create_new(true), path)
}

/// The file at `path`, which is made if there is none, open for reading and writing. A symbolic link is refused.
pub(crate) fn open_or_create_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    open(
        options
            .create(true)
            .truncate(false)
            .custom_flags(libc::O_NOFOLLOW),
        path,
    )
}

/// A new directory. Another run that shares it may have removed it again when this returns.
pub(crate) fn create_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(DIRECTORY).create(path)?;
    match close_directory(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Takes an existing directory away from everybody but its owner. Fails for another user's.
pub(crate) fn close_directory(path: &Path) -> io::Result<()> {
    match fs::set_permissions(path, Permissions::from_mode(DIRECTORY)) {
        Err(error) if fs::metadata(path)?.uid() != fs::metadata("/proc/self")?.uid() => Err(error),
        other => tolerate(other),
    }
}

fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.read(true).write(true).mode(FILE).open(path)?;
    // The umask may have taken bits that the owner needs, and an older file may have more.
    tolerate(file.set_permissions(Permissions::from_mode(FILE)))?;
    Ok(file)
}

/// Some file systems have no permissions to set: who may look there is decided where they are mounted.
fn tolerate(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).expect("it exists").permissions().mode() & 0o7777
    }

    #[test]
    fn what_is_made_is_the_owners_alone() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (inner, path) = (
            directory.path().join("inner"),
            directory.path().join("file"),
        );
        create_directory(&inner).expect("can be made");
        drop(create_file(&path).expect("can be made"));
        assert_eq!((mode(&inner), mode(&path)), (DIRECTORY, FILE));
        assert_eq!(
            create_directory(&inner).expect_err("is there").kind(),
            io::ErrorKind::AlreadyExists
        );
    }

    #[test]
    fn what_somebody_has_open_is_replaced_and_what_was_open_to_all_is_closed() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("file");
        fs::write(&path, "old").expect("writable");
        fs::set_permissions(&path, Permissions::from_mode(0o666)).expect("ours");
        let mut reader = File::open(&path).expect("readable");
        create_file(&path)
            .and_then(|mut file| file.write_all(b"new"))
            .expect("writable");
        let mut seen = String::new();
        reader.read_to_string(&mut seen).expect("readable");
        assert_eq!((seen.as_str(), mode(&path)), ("old", FILE));
        fs::set_permissions(&path, Permissions::from_mode(0o666)).expect("ours");
        drop(open_or_create_file(&path).expect("can be opened"));
        assert_eq!(mode(&path), FILE);
        assert_eq!(fs::read(&path).expect("readable"), b"new");
    }

    #[test]
    fn a_link_is_neither_followed_nor_locked() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (target, link) = (
            directory.path().join("target"),
            directory.path().join("link"),
        );
        fs::write(&target, "untouched").expect("writable");
        std::os::unix::fs::symlink(&target, &link).expect("a link");
        assert!(open_or_create_file(&link).is_err());
        create_file(&link)
            .and_then(|mut file| file.write_all(b"new"))
            .expect("replaces the link");
        assert_eq!(fs::read(&target).expect("readable"), b"untouched");
    }
}
