//! An `io_uring` that owns the transfers it has handed to the kernel.
//!
//! The kernel holds raw pointers into the buffers of transfers in flight. The invariant that makes this
//! sound: *a transfer that was handed to the kernel leaves [`Ring::in_flight`] only through its
//! completion entry*. Dropping the ring waits for all of them; if the kernel refuses even that, they
//! are leaked, since memory that is never reused can be written late without harm.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, types};

use super::operation::OpKind;
use super::transfer::Transfer;
use super::wake::Wake;
use crate::error::StorageError;

/// Marks the completion entry of the wake event. Transfers are numbered from zero.
const WAKE: u64 = u64::MAX;

/// How long to wait before asking a kernel that is out of resources again.
const RETRY_PAUSE: Duration = Duration::from_millis(1);

/// One thing the kernel reported.
pub(super) enum Event {
    /// The wake event was signalled; the ring no longer watches it.
    Woken,
    /// A piece of a transfer ended.
    Moved(Transfer, io::Result<usize>),
}

/// A ring and everything in flight in it. Stays on the thread that made it.
pub(super) struct Ring {
    uring: IoUring,
    /// Transfers whose buffers the kernel may touch, by number; `None` where the number is free.
    in_flight: Vec<Option<Transfer>>,
    free: Vec<usize>,
    wake: Arc<Wake>,
    reported: VecDeque<(u64, i32)>,
}

impl Ring {
    /// Makes a ring for `depth` transfers at a time that also watches `wake`; tells which set-up the
    /// kernel accepted.
    pub(super) fn open(
        depth: usize,
        wake: Arc<Wake>,
    ) -> Result<(Self, &'static str), StorageError> {
        // One more entry for the wake event.
        let entries = u32::try_from(depth + 1)
            .ok()
            .and_then(u32::checked_next_power_of_two)
            .ok_or(StorageError::Depth {
                depth,
                max: super::MAX_DEPTH,
            })?;
        let (uring, setup) = build(entries)?;
        probe(&uring)?;
        let ring = Self {
            uring,
            in_flight: std::iter::repeat_with(|| None).take(depth).collect(),
            free: (0..depth).rev().collect(),
            wake,
            reported: VecDeque::with_capacity(depth + 1),
        };
        Ok((ring, setup))
    }

    /// Whether another transfer may be started.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether no transfer is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.free.len() == self.in_flight.len()
    }

    /// Takes a transfer in and queues its next piece for the kernel. Gives it back when there is no
    /// room.
    #[expect(
        clippy::result_large_err,
        reason = "the transfer moves back to its owner; boxing it would allocate on every refusal"
    )]
    pub(super) fn start(&mut self, mut transfer: Transfer) -> Result<(), Transfer> {
        let Some(number) = self.free.pop() else {
            return Err(transfer);
        };
        let piece = transfer.piece();
        let descriptor = types::Fd(std::os::fd::AsRawFd::as_raw_fd(piece.file.file()));
        // A piece is never longer than i32::MAX.
        let length = u32::try_from(piece.buffer.len()).unwrap_or(u32::MAX >> 1);
        let entry = match piece.kind {
            OpKind::Read => opcode::Read::new(descriptor, piece.buffer.as_mut_ptr(), length)
                .offset(piece.offset)
                .build(),
            OpKind::Write => opcode::Write::new(descriptor, piece.buffer.as_ptr(), length)
                .offset(piece.offset)
                .build(),
        };
        if self.push(&entry.user_data(number as u64)).is_err() {
            self.free.push(number);
            return Err(transfer);
        }
        self.in_flight[number] = Some(transfer);
        Ok(())
    }

    /// Watches the wake event until it is signalled once.
    pub(super) fn watch(&mut self) -> io::Result<()> {
        let descriptor = types::Fd(self.wake.descriptor());
        let interest = u32::from(libc::POLLIN.cast_unsigned());
        let entry = opcode::PollAdd::new(descriptor, interest)
            .build()
            .user_data(WAKE);
        self.push(&entry)
            .map_err(|_| io::Error::from_raw_os_error(libc::EBUSY))
    }

    fn push(&mut self, entry: &io_uring::squeue::Entry) -> Result<(), io_uring::squeue::PushError> {
        // SAFETY: the descriptor and the buffer named by the entry stay valid until its completion
        // is reaped: those of a transfer by the invariant of this module (the caller puts it into
        // `in_flight`, whose leases and files are not touched meanwhile), the wake event by `self.wake`,
        // which outlives `self.uring`'s use of it because the kernel holds its own reference to a
        // polled file.
        unsafe { self.uring.submission().push(entry) }
    }

    /// Hands queued pieces to the kernel and waits until it has reported something.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        if !self.reported.is_empty() {
            return Ok(());
        }
        match self.uring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // Out of request memory, or the completion queue is full: reap, then try again.
                Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => {
                    if self.uring.completion().is_empty() {
                        std::thread::sleep(RETRY_PAUSE);
                    }
                }
                _ => return Err(error),
            },
        }
        let entries = self.uring.completion();
        self.reported
            .extend(entries.map(|entry| (entry.user_data(), entry.result())));
        Ok(())
    }

    /// The next thing reported, if any is left.
    pub(super) fn next_event(&mut self) -> Option<Event> {
        while let Some((number, result)) = self.reported.pop_front() {
            if number == WAKE {
                self.wake.clear();
                return Some(Event::Woken);
            }
            let slot = usize::try_from(number)
                .ok()
                .and_then(|n| Some((n, self.in_flight.get_mut(n)?)));
            if let Some((number, slot)) = slot
                && let Some(transfer) = slot.take()
            {
                self.free.push(number);
                let outcome = usize::try_from(result)
                    .map_err(|_| io::Error::from_raw_os_error(result.saturating_neg()));
                return Some(Event::Moved(transfer, outcome));
            }
            debug_assert!(false, "completion {number} belongs to no transfer");
        }
        None
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // A disk transfer cannot be called back half-way, so the ring waits for the device. Closing the
        // descriptor alone would not do: the kernel then ends requests in the background, after this
        // memory has gone to someone else.
        while !self.is_idle() {
            if self.wait().is_err() {
                for transfer in self.in_flight.drain(..).flatten() {
                    transfer.abandon();
                }
                return;
            }
            while self.next_event().is_some() {}
        }
    }
}

/// A name and the flags that go with it.
type Setup = (&'static str, fn(&mut io_uring::Builder));

/// Makes a ring with the cheapest set-up that the kernel knows.
fn build(entries: u32) -> Result<(IoUring, &'static str), StorageError> {
    let attempts: [Setup; 3] = [
        ("single issuer, deferred task run", |builder| {
            builder.setup_single_issuer().setup_defer_taskrun();
        }),
        ("cooperative task run", |builder| {
            builder.setup_coop_taskrun();
        }),
        ("plain", |_| {}),
    ];
    let mut refusal = io::Error::from_raw_os_error(libc::EINVAL);
    for (name, configure) in attempts {
        let mut builder = IoUring::builder();
        builder.dontfork();
        configure(&mut builder);
        match builder.build(entries) {
            Ok(ring) => return Ok((ring, name)),
            // An older kernel does not know these flags.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refusal = error,
            Err(error) => return Err(refused(&error)),
        }
    }
    Err(refused(&refusal))
}

/// Checks that the kernel has the three operations used here.
fn probe(ring: &IoUring) -> Result<(), StorageError> {
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|error| refused(&error))?;
    let needed = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::PollAdd::CODE,
    ];
    if needed.iter().all(|code| probe.is_supported(*code)) {
        Ok(())
    } else {
        Err(StorageError::IoUringRefused {
            reason: "the kernel's io_uring has no plain read, write, or poll (Linux before 5.6)"
                .into(),
        })
    }
}

fn refused(error: &io::Error) -> StorageError {
    let policy = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let hint = match (error.raw_os_error(), policy.trim()) {
        (Some(libc::EPERM | libc::EACCES), "1" | "2") => " (kernel.io_uring_disabled forbids it)",
        (Some(libc::EPERM | libc::EACCES), _) => " (a container's seccomp policy forbids it)",
        (Some(libc::ENOSYS), _) => " (this kernel has no io_uring)",
        (Some(libc::ENOMEM), _) => " (the locked-memory limit is too small)",
        _ => "",
    };
    StorageError::IoUringRefused {
        reason: format!("io_uring_setup: {error}{hint}"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use zeroxide_memory::{Arena, Bucket, Budget};

    use super::*;
    use crate::file::DiskFile;
    use crate::queue::counters::Meter;
    use crate::queue::operation::Operation;

    /// A ring dropped with reads in flight has waited for them: every buffer is back, and nothing
    /// writes to that memory afterwards.
    #[test]
    fn dropping_waits_for_what_is_in_flight() {
        const BYTES: usize = 1 << 20;
        let directory = tempfile::tempdir().expect("a temporary directory");
        let count = 32;
        let file = DiskFile::create(directory.path().join("data"), (count * BYTES) as u64)
            .expect("room for the file");
        let contents = vec![0x77; count * BYTES];
        std::fs::write(file.path(), &contents).expect("writable");
        let arena = Arena::new(&Budget::new(None), Bucket::Staging, count * BYTES).expect("memory");
        let meter = Arc::new(Meter::default());
        let wake = Arc::new(Wake::new().expect("an event"));
        let mut ring = match Ring::open(count, wake) {
            Ok((ring, _)) => ring,
            Err(StorageError::IoUringRefused { .. }) => return,
            Err(other) => panic!("{other}"),
        };
        let (reply, completions) = channel();
        ring.watch().expect("room in the queue");
        for index in 0..count {
            let mut buffer = arena.lease(BYTES, 4096).expect("room in the arena");
            buffer.fill(0);
            let operation = Operation {
                kind: OpKind::Read,
                file: Arc::clone(&file),
                offset: (index * BYTES) as u64,
                buffer,
                tag: index as u64,
                unit: None,
                reply: reply.clone().into(),
            };
            assert!(
                ring.start(Transfer::new(operation, &meter)).is_ok(),
                "no room for {index}"
            );
        }
        // Hands everything to the kernel without waiting for any of it.
        ring.uring.submit().expect("accepted");
        drop(ring);
        let mut buffers: Vec<_> = completions
            .try_iter()
            .map(|completion| completion.buffer)
            .collect();
        assert_eq!(buffers.len(), count, "a buffer did not come back");
        for buffer in &mut buffers {
            assert!(
                buffer.iter().all(|byte| *byte == 0x77),
                "released before the kernel was done"
            );
            buffer.fill(0x11);
        }
        std::thread::sleep(Duration::from_millis(50));
        for buffer in &buffers {
            assert!(
                buffer.iter().all(|byte| *byte == 0x11),
                "written after it was released"
            );
        }
    }
}
