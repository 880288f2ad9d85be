//! Worker threads with a fixed map from task to thread.

use std::sync::Mutex;

use crate::error::OptimError;

/// A private pool of worker threads for the kernels.
///
/// Task `i` always runs on thread `i % threads`: memory that a task touches first stays on that thread's
/// NUMA node, and a thread never waits for another one's work. Results do not depend on it, since tasks
/// write disjoint data.
#[derive(Debug)]
pub struct Pool {
    workers: rayon::ThreadPool,
}

impl Pool {
    /// Starts `threads` worker threads (at least one).
    pub fn new(threads: usize) -> Result<Self, OptimError> {
        let threads = threads.max(1);
        let workers = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("zx-optim-{index}"))
            .build()
            .map_err(|source| OptimError::Threads { threads, source })?;
        Ok(Self { workers })
    }

    /// Number of worker threads.
    pub fn threads(&self) -> usize {
        self.workers.current_num_threads()
    }

    /// Runs `task(0)` to `task(num_tasks - 1)` and returns when all are done.
    ///
    /// # Panics
    /// If a task panics, after the other threads have finished theirs.
    pub fn run(&self, num_tasks: usize, task: impl Fn(usize) + Sync) {
        if num_tasks == 0 {
            return;
        }
        let threads = self.threads();
        self.workers.broadcast(|thread| {
            for index in (thread.index()..num_tasks).step_by(threads) {
                task(index);
            }
        });
    }

    /// Runs `task(i, items[i])` for every item, each item moved to the thread that works on it: the way to
    /// hand out exclusive slices.
    ///
    /// # Panics
    /// If a task panics, after the other threads have finished theirs.
    pub fn run_each<T: Send>(&self, items: Vec<T>, task: impl Fn(usize, T) + Sync) {
        let slots: Vec<Mutex<Option<T>>> = items
            .into_iter()
            .map(|item| Mutex::new(Some(item)))
            .collect();
        self.run(slots.len(), |index| {
            // The lock is released before the task runs, so that a panic in it poisons nothing.
            let item = slots[index].lock().ok().and_then(|mut slot| slot.take());
            task(index, item.expect("each index runs once"));
        });
    }
}
