//! Opening and preallocating files.

#![allow(clippy::unwrap_used, reason = "a failed test set-up is a failed test")]

mod harness;

use std::fs;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use harness::with_mount;
use zeroxide_storage::{DiskFile, StorageError};

/// Blocks are there before anything is written, also over an older, longer file.
fn create_allocates(directory: &Path) {
    let path = directory.join("data");
    fs::write(&path, vec![1; 3 << 20]).unwrap();
    let file = DiskFile::create(&path, 1 << 20).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((file.bytes(), metadata.len()), (1 << 20, 1 << 20));
    assert!(
        metadata.blocks() * 512 >= 1 << 20,
        "only {} blocks are allocated",
        metadata.blocks()
    );
    assert_eq!(DiskFile::open(&path).unwrap().bytes(), 1 << 20);
}

#[test]
fn creating_allocates_every_block() {
    create_allocates(tempfile::tempdir().unwrap().path());
    with_mount("tmpfs", "size=8m", create_allocates);
}

#[test]
fn direct_io_is_used_exactly_where_a_read_succeeds() {
    let accepts = |path: &Path| {
        let file = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(path);
        file.is_ok_and(|file| {
            let memory = vec![0_u8; 8192];
            let start = memory.as_ptr().align_offset(4096);
            let mut memory = memory;
            std::os::unix::fs::FileExt::read_at(&file, &mut memory[start..start + 4096], 0).is_ok()
        })
    };
    let check = |directory: &Path| {
        let file = DiskFile::create(directory.join("data"), 1 << 16).unwrap();
        assert_eq!(file.is_direct(), accepts(file.path()));
        file.is_direct()
    };
    check(tempfile::tempdir().unwrap().path());
    with_mount("tmpfs", "size=8m", |path| {
        check(path);
    });
    with_mount("ramfs", "", |path| {
        assert!(!check(path), "ramfs has no direct I/O");
    });
}

#[test]
fn a_file_that_does_not_fit_is_not_left_behind() {
    with_mount("tmpfs", "size=1m", |directory| {
        let path = directory.join("data");
        let error = DiskFile::create(&path, 2 << 20).unwrap_err();
        match error {
            StorageError::NoSpace {
                need,
                free,
                path: named,
            } => {
                assert_eq!((need, &named), (2 << 20, &path));
                assert!(free <= 1 << 20);
            }
            other => panic!("{other}"),
        }
        assert!(!path.exists());
        DiskFile::create(&path, 1 << 19).unwrap();
    });
}

#[test]
fn what_cannot_be_opened_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("no/data");
    let error = DiskFile::create(&missing, 4096).unwrap_err();
    assert!(
        matches!(error, StorageError::MissingParent { .. }),
        "{error}"
    );
    let error = DiskFile::open(directory.path().join("data")).unwrap_err();
    assert!(
        matches!(error, StorageError::File { action: "open", .. }),
        "{error}"
    );
    let error = DiskFile::create(directory.path(), 4096).unwrap_err();
    assert!(
        error
            .to_string()
            .contains(directory.path().to_str().unwrap()),
        "{error}"
    );
}

/// A user's file is kept as it is, and made longer where a write asks for more.
#[test]
fn a_file_of_the_users_keeps_what_it_has() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    for direct in [true, false] {
        fs::write(&path, vec![7; 100]).unwrap();
        let file = DiskFile::open_to_write(&path, 8192, direct).unwrap();
        assert_eq!(file.bytes(), 8192);
        let found = fs::read(&path).unwrap();
        assert_eq!(
            (found.len(), &found[..100], found[100]),
            (8192, &[7; 100][..], 0)
        );
        assert_eq!(
            DiskFile::open_to_write(&path, 10, direct).unwrap().bytes(),
            8192
        );
        assert!(direct || !file.is_direct());
        let mut permissions = fs::metadata(&path).unwrap().permissions();
        permissions.set_readonly(true);
        fs::set_permissions(&path, permissions).unwrap();
        assert_eq!(DiskFile::open_to_read(&path, direct).unwrap().bytes(), 8192);
        fs::remove_file(&path).unwrap();
    }
    DiskFile::open_to_write(&path, 1, true).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o400, 0o400);
}
