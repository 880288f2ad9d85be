//! The public face, where it is about commits of a durable run.

use zeroxide_storage::Commit;

use crate::api::Offload;
use crate::core::Core;
use crate::durable::reads::CommittedReads;
use crate::error::Result;

impl Offload {
    /// Numbers of the commits that an earlier run has left, the oldest first; empty once one was adopted.
    pub fn found_commits(&self) -> Result<Vec<u64>> {
        self.with("found_commits", |core| {
            core.check_durable("found_commits")?;
            Ok(core.disk().store.found())
        })
    }

    /// Goes on from one of them, or from none for 0. Everything must be filled, or [rolled back](Self::roll_back), before
    /// it is used.
    pub fn adopt(&self, generation: u64) -> Result<Option<Commit>> {
        self.with("adopt", |core| core.adopt(generation))
    }

    /// The first half of a commit of all state as it is now, with a note; its number. Nothing may change before the
    /// second half, [`conclude_commit`](Self::conclude_commit), which is for when all ranks have done the first.
    pub fn prepare_commit(&self, note: &str) -> Result<u64> {
        self.with("prepare_commit", |core| core.prepare_commit(note))
    }

    /// The second half of a commit.
    pub fn conclude_commit(&self) -> Result<()> {
        self.with("conclude_commit", Core::conclude_commit)
    }

    /// Makes all state but numbers of updates what the last commit says.
    pub fn roll_back(&self) -> Result<()> {
        self.with("roll_back", Core::roll_back)
    }

    /// A reader of the last commit; while there is one, no other commit is made.
    pub fn committed_reads(&self) -> Result<CommittedReads> {
        self.with("committed_reads", Core::committed_reads)
    }
}
