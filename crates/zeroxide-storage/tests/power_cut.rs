//! A power cut at any point, on a disk that drops and reorders what was not synced: the store opens at the last commit,
//! or as a whole at the one that was under way.

#![allow(clippy::unwrap_used, reason = "a failed test set-up is a failed test")]

mod harness;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use harness::committing::{check, open, open_with, tiles, write};
use harness::platter::{Choices, Platter};
use proptest::prelude::*;
use zeroxide_layout::BlockId;
use zeroxide_storage::{BlockStore, Journal, JournalEntry, SimOptions, StorageError};

/// Tiles of the store by number.
const TILES: usize = 6;

#[derive(Debug, Clone, Copy)]
enum Act {
    Write(usize),
    Commit,
    RollBack,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        6 => (0..TILES).prop_map(Act::Write),
        3 => Just(Act::Commit),
        1 => Just(Act::RollBack),
    ];
    prop::collection::vec(act, 4..32)
}

/// The version of each tile that was ever written.
type Contents = BTreeMap<usize, u64>;

/// What was done, and what each commit names.
struct Run {
    entries: Vec<JournalEntry>,
    /// Entries there were when the store was open.
    opened: usize,
    /// By generation, from 1: entries there were when the commit was begun and when its first half was done.
    commits: Vec<(usize, usize, Contents)>,
    files: Vec<(PathBuf, Vec<u8>)>,
}

fn run(root: &Path, acts: &[Act]) -> Run {
    let journal = Journal::default();
    let simulation = SimOptions {
        journal: Some(journal.clone()),
        short_share: 0.3,
        ..SimOptions::default()
    };
    let store = open_with(&[root], simulation).unwrap();
    let places = tiles(&store);
    assert_eq!(places.len(), TILES);
    let opened = journal.len();
    let (mut newest, mut committed) = (Contents::new(), Contents::new());
    let mut commits = Vec::new();
    for (version, act) in (1..).zip(acts) {
        match act {
            Act::Write(index) => {
                let (block, tile, _) = places[*index];
                write(&store, block, tile, version).unwrap();
                newest.insert(*index, version);
            }
            Act::Commit => {
                let begun = journal.len();
                store.prepare_commit("").unwrap();
                commits.push((begun, journal.len(), newest.clone()));
                store.conclude_commit().unwrap();
                committed.clone_from(&newest);
            }
            Act::RollBack => {
                store.roll_back().unwrap();
                newest.clone_from(&committed);
            }
        }
    }
    let empty = |name: &str, bytes| (root.join("job").join(name), vec![0; bytes]);
    let bytes = usize::try_from(store.bytes()).unwrap();
    Run {
        entries: journal.entries(),
        opened,
        commits,
        files: vec![empty("blocks.bin", bytes), empty("LOCK", 0)],
    }
}

/// Cuts the power after `cut` acts, and opens what is left.
fn check_cut(run: &Run, root: &Path, cut: usize, seed: u64) {
    let mut platter = Platter::with_files(run.files.clone());
    for entry in &run.entries[..cut] {
        platter.act(entry);
    }
    let left = tempfile::tempdir().unwrap();
    platter.cut(&mut Choices::new(seed), root, left.path());
    let store = open(&[left.path()]).unwrap();
    let newest = store.found().last().copied().unwrap_or(0);
    let certain = run.commits.iter().filter(|it| it.1 <= cut).count();
    let possible = run.commits.iter().filter(|it| it.0 < cut).count();
    let number = usize::try_from(newest).unwrap();
    assert!(
        (certain..=possible).contains(&number),
        "cut at {cut}: opened at commit {newest}, not between {certain} and {possible}"
    );
    if number == 0 {
        return;
    }
    store.adopt(newest).unwrap();
    store.roll_back().unwrap();
    check_contents(&store, &tiles(&store), &run.commits[number - 1].2);
}

fn check_contents(store: &BlockStore, places: &[(BlockId, u32, usize)], contents: &Contents) {
    for (index, (block, tile, _)) in places.iter().enumerate() {
        match contents.get(&index) {
            Some(version) => check(store, *block, *tile, *version),
            None => assert!(matches!(
                harness::committing::read(store, *block, *tile),
                Err(StorageError::NeverWritten { .. })
            )),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Catches: no sync of the data before the manifest, none of the manifest before its rename, none of the directory
    /// after it, a manifest that goes before the next one is safe, a write into the slot that the last commit names.
    #[test]
    fn a_cut_anywhere_leaves_a_whole_commit(acts in acts(), seed in any::<u64>()) {
        let root = tempfile::tempdir().unwrap();
        let run = run(root.path(), &acts);
        let mut choices = Choices::new(seed);
        for _ in 0..12 {
            let cut = run.opened + choices.below(run.entries.len() - run.opened + 1);
            check_cut(&run, root.path(), cut, seed ^ cut as u64);
        }
    }
}

/// The same at every single point of one run, which has every act in it.
#[test]
fn a_cut_at_every_point_of_a_run() {
    let root = tempfile::tempdir().unwrap();
    let round = [0, 1, 2].map(Act::Write);
    let mut acts: Vec<Act> = (0..TILES).map(Act::Write).collect();
    for _ in 0..3 {
        acts.push(Act::Commit);
        acts.extend(round);
    }
    acts.push(Act::RollBack);
    acts.extend([Act::Write(4), Act::Commit, Act::Write(4), Act::Write(0)]);
    let run = run(root.path(), &acts);
    assert!(fs::read_dir(root.path().join("job")).unwrap().count() >= 4);
    for cut in run.opened..=run.entries.len() {
        for seed in 0..4 {
            check_cut(&run, root.path(), cut, seed * 1000 + cut as u64);
        }
    }
}
