//! What every device keeps to, whenever its copies really run.

use zeroxide_device::{Device, DeviceError, Event, Stream};
use zeroxide_memory::{Arena, Bucket, Budget, Lease};

const BYTES: usize = 1 << 16;

struct Bench {
    budget: Budget,
    arena: Arena,
}

impl Bench {
    fn new() -> Self {
        let budget = Budget::new(None);
        let arena = Arena::new(&budget, Bucket::Staging, 8 * BYTES).unwrap();
        Self { budget, arena }
    }

    /// Host memory whose bytes are a pattern of `seed`.
    fn filled(&self, seed: u8, bytes: usize) -> Lease {
        let mut lease = self.arena.lease(bytes, 64).unwrap();
        lease.copy_from_slice(&pattern(seed, bytes));
        lease
    }

    fn memory<D: Device>(&self, device: &D) -> D::Memory {
        device
            .allocate(&self.budget, Bucket::Gathered, BYTES)
            .unwrap()
    }

    /// All bytes of device memory, by a stream that waits for nothing.
    fn read<S: Stream>(&self, stream: &mut S, memory: &S::Memory) -> Vec<u8> {
        let copy = stream.download(memory, 0, self.filled(0, BYTES)).unwrap();
        copy.wait().unwrap().to_vec()
    }
}

fn pattern(seed: u8, bytes: usize) -> Vec<u8> {
    (0..251u8)
        .cycle()
        .take(bytes)
        .map(|byte| byte ^ seed)
        .collect()
}

/// Bytes come back as they were sent, to where they were sent, and nothing beside them changes.
fn a_part_is_written_and_read<D: Device>(device: &D) {
    let (bench, mut stream) = (Bench::new(), device.stream().unwrap());
    let memory = bench.memory(device);
    let sent = bench.filled(1, BYTES);
    let address = sent.as_ptr();
    let back = stream.upload(sent, &memory, 0).unwrap().wait().unwrap();
    assert_eq!(
        back.as_ptr(),
        address,
        "a copy gives the memory back that it took"
    );
    drop(
        stream
            .upload(bench.filled(2, 1000), &memory, 777)
            .unwrap()
            .wait()
            .unwrap(),
    );
    let mut expected = pattern(1, BYTES);
    expected[777..1777].copy_from_slice(&pattern(2, 1000));
    assert_eq!(bench.read(&mut stream, &memory), expected);
    let piece = stream
        .download(&memory, 900, bench.filled(0, 50))
        .unwrap()
        .wait()
        .unwrap();
    assert_eq!(*piece, expected[900..950]);
}

/// Copies of one stream run in the order in which they were given, waited for or not.
fn a_stream_is_an_order<D: Device>(device: &D) {
    let (bench, mut stream) = (Bench::new(), device.stream().unwrap());
    let memory = bench.memory(device);
    let first = stream.upload(bench.filled(3, BYTES), &memory, 0).unwrap();
    let read = stream.download(&memory, 0, bench.filled(0, BYTES)).unwrap();
    let second = stream.upload(bench.filled(4, BYTES), &memory, 0).unwrap();
    assert_eq!(
        *read.wait().unwrap(),
        pattern(3, BYTES),
        "the read is between the two writes"
    );
    drop(second.wait().unwrap());
    drop(first.wait().unwrap());
    assert_eq!(bench.read(&mut stream, &memory), pattern(4, BYTES));
}

/// A stream that waits for an event sees what came before it in another stream.
fn an_event_orders_streams<D: Device>(device: &D) {
    let (bench, mut one) = (Bench::new(), device.stream().unwrap());
    let mut other = device.stream().unwrap();
    let memory = bench.memory(device);
    let copy = one.upload(bench.filled(5, BYTES), &memory, 0).unwrap();
    let event = one.record().unwrap();
    other.wait_for(&event).unwrap();
    assert_eq!(bench.read(&mut other, &memory), pattern(5, BYTES));
    assert!(event.has_come().unwrap(), "what waited for it has come");
    drop(copy);
    let late = one.record().unwrap();
    late.clone().wait().unwrap();
    assert!(late.has_come().unwrap());
}

/// Memory of a copy goes back when the copy has ended, also where nobody waits: it is not written afterwards.
fn a_dropped_copy_ends_first<D: Device>(device: &D) {
    let (bench, mut stream) = (Bench::new(), device.stream().unwrap());
    let memory = bench.memory(device);
    let free = bench.arena.free().unwrap();
    drop(stream.upload(bench.filled(6, BYTES), &memory, 0).unwrap());
    drop(stream.download(&memory, 0, bench.filled(0, BYTES)).unwrap());
    assert_eq!(bench.arena.free().unwrap(), free);
    let mine = bench.filled(7, BYTES);
    stream.record().unwrap().wait().unwrap();
    assert_eq!(*mine, pattern(7, BYTES));
}

/// Device memory that is dropped while copies use it stays until they have ended; its bytes are given back then.
fn dropped_memory_outlives_its_copies<D: Device>(device: &D) {
    let (bench, mut stream) = (Bench::new(), device.stream().unwrap());
    let memory = bench.memory(device);
    assert_eq!(bench.budget.usage(Bucket::Gathered).current, BYTES as u64);
    let up = stream.upload(bench.filled(8, BYTES), &memory, 0).unwrap();
    let down = stream.download(&memory, 0, bench.filled(0, BYTES)).unwrap();
    drop(memory);
    assert_eq!(*down.wait().unwrap(), pattern(8, BYTES));
    drop(up);
    drop(stream);
    assert_eq!(bench.budget.usage(Bucket::Gathered).current, 0);
}

/// Registered memory is copied as any other, during the registration and after it.
fn registration_changes_no_byte<D: Device>(device: &D) {
    let (bench, mut stream) = (Bench::new(), device.stream().unwrap());
    let memory = bench.memory(device);
    let lease = bench.filled(9, BYTES);
    let registration = device.register(&lease).unwrap();
    let lease = stream.upload(lease, &memory, 0).unwrap().wait().unwrap();
    assert_eq!(bench.read(&mut stream, &memory), pattern(9, BYTES));
    drop(registration);
    assert_eq!(*lease, pattern(9, BYTES));
}

/// A copy that does not fit is refused with its numbers, and nothing is written.
fn a_copy_that_does_not_fit_is_refused<D: Device>(device: &D) {
    let (bench, mut stream) = (Bench::new(), device.stream().unwrap());
    let memory = bench.memory(device);
    drop(
        stream
            .upload(bench.filled(1, BYTES), &memory, 0)
            .unwrap()
            .wait()
            .unwrap(),
    );
    for at in [1, BYTES, usize::MAX] {
        for found in [
            stream.upload(bench.filled(2, BYTES), &memory, at),
            stream.download(&memory, at, bench.filled(2, BYTES)),
        ] {
            match found.err() {
                Some(DeviceError::OutOfRange {
                    at: said,
                    count,
                    size,
                }) => {
                    assert_eq!((said, count, size), (at, BYTES, BYTES));
                }
                other => panic!("expected OutOfRange at {at}, got {other:?}"),
            }
        }
    }
    assert_eq!(bench.read(&mut stream, &memory), pattern(1, BYTES));
}

/// Runs all of it.
pub(crate) fn check<D: Device>(device: &D) {
    a_part_is_written_and_read(device);
    a_stream_is_an_order(device);
    an_event_orders_streams(device);
    a_dropped_copy_ends_first(device);
    dropped_memory_outlives_its_copies(device);
    registration_changes_no_byte(device);
    a_copy_that_does_not_fit_is_refused(device);
}
