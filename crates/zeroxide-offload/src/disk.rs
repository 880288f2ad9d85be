//! The disk side of a core: the files, the queue to them, and the staging memory in between.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use zeroxide_memory::{Activity, Arena, Bucket, Budget, Recorder};
use zeroxide_storage::{
    BlockSpec, BlockStore, Completion, Durable, Queue, QueueOptions, StoreOptions, open_queue_with,
};

use crate::core::to_usize;
use crate::error::{OffloadError, Result, misuse};
use crate::io_report::Stopwatch;
use crate::settings::Settings;

/// Present when anything is at home on disk.
pub(crate) struct Disk {
    pub(crate) store: Arc<BlockStore>,
    pub(crate) queue: Arc<dyn Queue>,
    /// Staging memory: every byte between disk and compute that is not a window.
    pub(crate) ring: Arena,
    /// Where reads into windows end.
    pub(crate) arrivals: (Sender<Completion>, Receiver<Completion>),
    /// Time in which compute stood still for the disk.
    pub(crate) waited: Stopwatch,
    recorder: Recorder,
}

impl Disk {
    /// `tile` and `need`: bytes of one tile, and what the ring must have at least.
    pub(crate) fn open(
        budget: &Budget,
        settings: &Settings,
        (tile, need): (u64, u64),
        blocks: Vec<BlockSpec>,
        recorder: &Recorder,
    ) -> Result<Self> {
        if settings.staging_bytes < need {
            return misuse(
                "new",
                format!(
                    "the staging ring has {} bytes and needs {need}: two tiles of {tile}",
                    settings.staging_bytes
                ),
            );
        }
        let options = QueueOptions {
            recorder: recorder.clone(),
            ..QueueOptions::default()
        };
        let queue = open_queue_with(settings.engine.clone(), settings.queue_depth, &options)?;
        let store = Arc::new(BlockStore::create(StoreOptions {
            directories: settings.directories.clone(),
            shares: settings.shares.clone(),
            job: settings.job.clone(),
            blocks,
            queue: Arc::clone(&queue),
            ephemeral: true,
            spare: settings.speculates,
            durable: settings.durable.clone().map(|facts| Durable { facts }),
        })?);
        let ring = Arena::new(budget, Bucket::Staging, to_usize(settings.staging_bytes))?;
        Ok(Self {
            store,
            queue,
            ring,
            arrivals: channel(),
            waited: Stopwatch::default(),
            recorder: recorder.clone(),
        })
    }

    /// Ends all traffic and removes the scratch files, which a durable store keeps.
    pub(crate) fn close(self) -> Result<()> {
        self.queue.close();
        // Whoever still reads a commit finds the queue closed, and lets the store go.
        Arc::try_unwrap(self.store).map_or(Ok(()), BlockStore::close)?;
        Ok(())
    }

    /// Takes one completion, waiting for it if there is none yet.
    pub(crate) fn receive(&self, replies: &Receiver<Completion>) -> Result<Completion> {
        if let Ok(completion) = replies.try_recv() {
            return Ok(completion);
        }
        let (start, begun) = (Instant::now(), self.recorder.begin());
        let completion = replies.recv();
        self.recorder.end(begun, Activity::DiskWait, None, 0);
        self.waited.add(start.elapsed());
        completion.map_err(|_| OffloadError::Misuse {
            call: "wait",
            what: "the I/O engine ended with work in flight".into(),
        })
    }
}
