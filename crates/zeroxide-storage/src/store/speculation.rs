//! Versions that may be taken back: what is written after [`keep_newest`](BlockStore::keep_newest) goes to the other
//! place of its tile, and [`take_back`](BlockStore::take_back) makes what was kept the newest again.
//!
//! A store made for it has two places for each tile that commits would name. It makes no commits: both would need the
//! other place. Tiles that commits do not name have one place and are not taken back.

use crate::error::StorageError;
use crate::store::BlockStore;

impl BlockStore {
    /// Keeps the newest version of every tile where it is, until it is called again.
    ///
    /// # Errors
    ///
    /// [`StorageError::Commit`] where the store was not made for it.
    pub fn keep_newest(&self) -> Result<(), StorageError> {
        self.check_spare("keep_newest")?;
        self.versions.commit();
        Ok(())
    }

    /// Forgets what was written since the newest versions were kept. Nothing may be in flight.
    ///
    /// # Errors
    ///
    /// As [`keep_newest`](Self::keep_newest).
    pub fn take_back(&self) -> Result<(), StorageError> {
        self.check_spare("take_back")?;
        self.versions.take_back();
        Ok(())
    }

    fn check_spare(&self, call: &'static str) -> Result<(), StorageError> {
        self.guard.check_process()?;
        if self.spare && self.commits.is_none() {
            return Ok(());
        }
        Err(self.refuse(call, "the store has no places to spare for it"))
    }
}
