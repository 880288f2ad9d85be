//! The host keeps to what every device does, and shows its memory to those who compute there.
#![expect(clippy::unwrap_used, reason = "a test fails on what it did not expect")]

mod conformance;

use zeroxide_device::{Device, Host, Stream};
use zeroxide_memory::{Arena, Bucket, Budget};

#[test]
fn the_host_conforms() {
    conformance::check(&Host);
}

#[test]
fn what_the_host_computes_is_downloaded() {
    let budget = Budget::new(Some(1 << 20));
    let arena = Arena::new(&budget, Bucket::Staging, 4096).unwrap();
    let memory = Host.allocate(&budget, Bucket::Gathered, 4096).unwrap();
    memory.bytes().fill(7);
    let copy = Host
        .stream()
        .unwrap()
        .download(&memory, 0, arena.lease(4096, 64).unwrap());
    assert!(copy.unwrap().wait().unwrap().iter().all(|&byte| byte == 7));
}

#[test]
fn memory_beyond_the_budget_is_refused() {
    let budget = Budget::new(Some(4096));
    let error = Host.allocate(&budget, Bucket::Gathered, 8192).unwrap_err();
    assert!(error.to_string().contains("8192"), "{error}");
}
