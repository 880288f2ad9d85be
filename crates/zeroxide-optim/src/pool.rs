//! Worker threads for the kernels.

use std::hint::black_box;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::OptimError;
use crate::openmp::OpenMp;

/// A private pool of worker threads for the kernels.
///
/// What recurs for the same memory (an optimizer's step) goes by a fixed map from task to thread: [`Pool::run`]. What
/// comes as it comes goes to whichever thread is free: [`Pool::run_each`]. Results depend on neither, since tasks write
/// disjoint data.
#[derive(Debug)]
pub struct Pool {
    workers: rayon::ThreadPool,
    /// Whether arithmetic on them takes denormal numbers for zero: threads inherit that from the one that starts them.
    flushes: bool,
    openmp: Option<OpenMp>,
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
        let flushes = workers.install(flushes_denormals);
        Ok(Self {
            workers,
            flushes,
            openmp: OpenMp::loaded(),
        })
    }

    /// The pool as it is in a process with that runtime.
    #[cfg(test)]
    pub(crate) fn with_openmp(mut self, openmp: OpenMp) -> Self {
        self.openmp = Some(openmp);
        self
    }

    /// Number of worker threads.
    pub fn threads(&self) -> usize {
        self.workers.current_num_threads()
    }

    /// Runs `task(0)` to `task(num_tasks - 1)` and returns when all are done.
    ///
    /// Task `i` always runs on thread `i % threads`: memory that a task touches first stays on that thread's NUMA node. A
    /// pool of one thread lets the calling one work, which would do nothing but wait.
    ///
    /// # Panics
    /// If a task panics, after the other threads have finished theirs.
    pub fn run(&self, num_tasks: usize, task: impl Fn(usize) + Sync) {
        if num_tasks == 0 {
            return;
        }
        let threads = self.threads();
        if threads == 1 && flushes_denormals() == self.flushes {
            (0..num_tasks).for_each(task);
            return;
        }
        self.workers.broadcast(|thread| {
            for index in (thread.index()..num_tasks).step_by(threads) {
                task(index);
            }
        });
    }

    /// Runs `task(i, items[i])` for every item on whichever thread is free, the calling one among them, and returns
    /// when all are done: the way to hand out exclusive slices.
    ///
    /// Where the process has OpenMP threads, as many as this pool at least, they do it: between two operations of torch
    /// they spin, and who is woken then waits for a core. Otherwise threads of the pool help the calling one. Which
    /// thread runs an item must change nothing, so threads whose arithmetic flushes denormals where the pool's does not,
    /// or the other way round, take no part.
    ///
    /// # Panics
    /// If a task panics, after the other threads have finished theirs.
    pub fn run_each<T: Send>(&self, items: Vec<T>, task: impl Fn(usize, T) + Sync) {
        let helpers = self.threads().min(items.len()).saturating_sub(1);
        let seats = AtomicUsize::new(helpers + 1);
        let next = Mutex::new(items.into_iter().enumerate());
        let work = || {
            let take_seat = |left: usize| left.checked_sub(1);
            if flushes_denormals() != self.flushes
                || seats
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take_seat)
                    .is_err()
            {
                return;
            }
            loop {
                // The lock is released before the task runs, so that a panic in it poisons nothing.
                let Some((index, item)) = next.lock().expect("no task holds it").next() else {
                    break;
                };
                task(index, item);
            }
        };
        if flushes_denormals() != self.flushes {
            self.workers.broadcast(|_| work());
            return;
        }
        match self.openmp {
            _ if helpers == 0 => work(),
            Some(openmp) if openmp.max_threads() > helpers => openmp.run(&work),
            _ => self.workers.in_place_scope(|scope| {
                for _ in 0..helpers {
                    scope.spawn(|_| work());
                }
                work();
            }),
        }
    }
}

/// Whether this thread's arithmetic takes denormal numbers for zero.
fn flushes_denormals() -> bool {
    black_box(f32::from_bits(1)) * black_box(1.0) == 0.0
}
