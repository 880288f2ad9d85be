//! A device of which nothing is done before somebody waits for it keeps to what every device does.
//!
//! It stands for devices that run beside the caller: a copy sees the bytes that are there when it runs, and the memory
//! that a download fills holds others until then.
#![expect(clippy::unwrap_used, reason = "a test fails on what it did not expect")]

mod conformance;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use zeroxide_device::{Device, DeviceError, Event, Registration, Result, Stream, Transfer};
use zeroxide_memory::{Arena, Bucket, Budget, Lease};

const POISON: u8 = 0xA5;

type Memory = Arc<Mutex<Lease>>;
type Slot = Arc<Mutex<Option<Lease>>>;

/// One thing that a stream has to do.
enum Op {
    Upload { from: Slot, to: Memory, at: usize },
    Download { from: Memory, at: usize, to: Slot },
    Wait { stream: usize, point: usize },
}

/// What is left to do, by stream, and how much each has done.
#[derive(Default)]
struct Queue {
    left: Vec<VecDeque<Op>>,
    done: Vec<usize>,
}

impl Queue {
    fn run_to(&mut self, stream: usize, point: usize) {
        while self.done[stream] < point {
            match self.left[stream]
                .pop_front()
                .expect("a point is one that was given")
            {
                Op::Upload { from, to, at } => {
                    let from = from.lock().unwrap();
                    let from = from.as_ref().expect("a copy has its memory");
                    to.lock().unwrap()[at..at + from.len()].copy_from_slice(from);
                }
                Op::Download { from, at, to } => {
                    let mut to = to.lock().unwrap();
                    let to = to.as_mut().expect("a copy has its memory");
                    let count = to.len();
                    to.copy_from_slice(&from.lock().unwrap()[at..at + count]);
                }
                Op::Wait { stream, point } => self.run_to(stream, point),
            }
            self.done[stream] += 1;
        }
    }
}

#[derive(Clone, Default)]
struct Late(Arc<Mutex<Queue>>);

struct LateStream {
    device: Late,
    stream: usize,
    given: usize,
}

#[derive(Clone)]
struct LateEvent {
    device: Late,
    stream: usize,
    point: usize,
}

impl LateStream {
    fn give(&mut self, op: Op) -> LateEvent {
        self.device.0.lock().unwrap().left[self.stream].push_back(op);
        self.given += 1;
        LateEvent {
            device: self.device.clone(),
            stream: self.stream,
            point: self.given,
        }
    }
}

/// Refuses a copy of `count` bytes at `at` that memory has no room for.
fn check(memory: &Memory, at: usize, count: usize) -> Result<()> {
    let size = memory.lock().unwrap().len();
    if at.checked_add(count).is_none_or(|end| end > size) {
        return Err(DeviceError::OutOfRange { at, count, size });
    }
    Ok(())
}

/// The end of a copy: what it waits for, then its memory.
fn ended(event: LateEvent, slot: Slot) -> Transfer {
    Transfer::new(move || {
        event.wait()?;
        Ok(slot.lock().unwrap().take().expect("a copy ends once"))
    })
}

impl Device for Late {
    type Memory = Memory;
    type Stream = LateStream;
    type Event = LateEvent;

    fn allocate(&self, budget: &Budget, bucket: Bucket, bytes: usize) -> Result<Memory> {
        let mut lease = Arena::new(budget, bucket, bytes)?.lease(bytes, 64)?;
        lease.fill(POISON);
        Ok(Arc::new(Mutex::new(lease)))
    }

    fn register(&self, memory: &Lease) -> Result<Registration> {
        Ok(Registration::until_dropped(Box::new(memory.len())))
    }

    fn stream(&self) -> Result<LateStream> {
        let mut queue = self.0.lock().unwrap();
        queue.left.push(VecDeque::new());
        queue.done.push(0);
        Ok(LateStream {
            device: self.clone(),
            stream: queue.left.len() - 1,
            given: 0,
        })
    }
}

impl Stream for LateStream {
    type Memory = Memory;
    type Event = LateEvent;

    fn upload(&mut self, from: Lease, to: &Memory, at: usize) -> Result<Transfer> {
        check(to, at, from.len())?;
        let slot = Arc::new(Mutex::new(Some(from)));
        let (from, to) = (Arc::clone(&slot), Arc::clone(to));
        Ok(ended(self.give(Op::Upload { from, to, at }), slot))
    }

    fn download(&mut self, from: &Memory, at: usize, mut to: Lease) -> Result<Transfer> {
        check(from, at, to.len())?;
        to.fill(POISON);
        let slot = Arc::new(Mutex::new(Some(to)));
        let (from, to) = (Arc::clone(from), Arc::clone(&slot));
        Ok(ended(self.give(Op::Download { from, at, to }), slot))
    }

    fn record(&mut self) -> Result<LateEvent> {
        Ok(LateEvent {
            device: self.device.clone(),
            stream: self.stream,
            point: self.given,
        })
    }

    fn wait_for(&mut self, event: &LateEvent) -> Result<()> {
        let (stream, point) = (event.stream, event.point);
        self.give(Op::Wait { stream, point });
        Ok(())
    }
}

impl Drop for LateStream {
    fn drop(&mut self) {
        self.device
            .0
            .lock()
            .unwrap()
            .run_to(self.stream, self.given);
    }
}

impl Event for LateEvent {
    fn has_come(&self) -> Result<bool> {
        Ok(self.device.0.lock().unwrap().done[self.stream] >= self.point)
    }

    fn wait(&self) -> Result<()> {
        self.device
            .0
            .lock()
            .unwrap()
            .run_to(self.stream, self.point);
        Ok(())
    }
}

#[test]
fn a_late_device_conforms() {
    conformance::check(&Late::default());
}

#[test]
fn it_is_late() {
    let (device, budget) = (Late::default(), Budget::new(None));
    let arena = Arena::new(&budget, Bucket::Staging, 8192).unwrap();
    let memory = device.allocate(&budget, Bucket::Gathered, 4096).unwrap();
    let mut stream = device.stream().unwrap();
    let copy = stream
        .upload(arena.lease(4096, 64).unwrap(), &memory, 0)
        .unwrap();
    let event = stream.record().unwrap();
    assert!(!event.has_come().unwrap());
    assert!(memory.lock().unwrap().iter().all(|&byte| byte == POISON));
    drop(copy.wait().unwrap());
    assert!(event.has_come().unwrap());
    assert!(memory.lock().unwrap().iter().all(|&byte| byte == 0));
}
