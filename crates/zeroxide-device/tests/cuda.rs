//! An NVIDIA device keeps to what every device does, by a driver for tests, of which nothing is done before somebody
//! waits for it.
#![expect(clippy::unwrap_used, reason = "a test fails on what it did not expect")]

mod conformance;

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;
use zeroxide_device::cuda::{Context, CudaError, DRIVER, Probe, Version, probe};
use zeroxide_device::{Device, DeviceError, Event, Stream};
use zeroxide_memory::{Arena, Bucket, Budget};

/// A driver in a folder of its own, built with `more` options: nothing of one test is in another's.
struct Driver {
    path: String,
    _folder: TempDir,
}

impl Driver {
    fn build(more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libcuda_fake.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_driver.c");
        let status = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
            .arg(&path)
            .arg(source)
            .args(more)
            .arg("-lpthread")
            .status()
            .unwrap();
        assert!(status.success(), "the driver for tests compiles");
        Self {
            path: path.display().to_string(),
            _folder: folder,
        }
    }
}

#[test]
fn a_cuda_device_conforms() {
    let driver = Driver::build(&[]);
    conformance::check(&Context::open(&driver.path, 0).unwrap());
}

#[test]
#[ignore = "needs a GPU; `make gpu` runs it"]
fn a_real_cuda_device_conforms() {
    conformance::check(&Context::open(DRIVER, 0).unwrap());
}

#[test]
#[ignore = "needs a GPU; `make gpu` runs it"]
fn a_real_device_refuses_more_than_it_has() {
    let context = Context::open(DRIVER, 0).unwrap();
    let (_, total) = context.memory().unwrap();
    let need = usize::try_from(2 * total).unwrap();
    let error = context
        .allocate(&Budget::new(None), Bucket::Gathered, need)
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("out of device memory: "), "{error}");
    println!("{error}");
}

#[test]
fn it_says_what_it_is() {
    let driver = Driver::build(&[]);
    let context = Context::open(&driver.path, 1).unwrap();
    assert_eq!(
        (context.device(), context.name(), context.architecture()),
        (1, "Fake 1", 90)
    );
    assert_eq!(
        context.driver_version(),
        Version {
            major: 13,
            minor: 0
        }
    );
    assert_eq!(context.memory().unwrap(), (1 << 30, 2 << 30));
}

#[test]
fn copies_run_beside_the_caller() {
    let driver = Driver::build(&[]);
    let context = Context::open(&driver.path, 0).unwrap();
    let budget = Budget::new(None);
    let arena = Arena::new(&budget, Bucket::Staging, 8192).unwrap();
    let memory = context.allocate(&budget, Bucket::Gathered, 4096).unwrap();
    let mut stream = context.stream().unwrap();
    let copy = stream
        .upload(arena.lease(4096, 64).unwrap(), &memory, 0)
        .unwrap();
    let event = stream.record().unwrap();
    assert!(!event.has_come().unwrap());
    drop(copy.wait().unwrap());
    assert!(event.has_come().unwrap());
}

#[test]
fn a_dropped_stream_has_done_everything() {
    let driver = Driver::build(&[]);
    let context = Context::open(&driver.path, 0).unwrap();
    let budget = Budget::new(None);
    let arena = Arena::new(&budget, Bucket::Staging, 4096).unwrap();
    let memory = context.allocate(&budget, Bucket::Gathered, 4096).unwrap();
    let mut stream = context.stream().unwrap();
    let copy = stream
        .upload(arena.lease(4096, 64).unwrap(), &memory, 0)
        .unwrap();
    let event = stream.record().unwrap();
    drop(stream);
    assert!(event.has_come().unwrap());
    drop(copy);
}

#[test]
fn memory_that_the_device_lacks_is_refused_with_its_numbers() {
    let driver = Driver::build(&[]);
    let context = Context::open(&driver.path, 0).unwrap();
    let budget = Budget::new(None);
    let need = (1 << 30) + 1;
    let error = context
        .allocate(&budget, Bucket::Gathered, need)
        .unwrap_err();
    let DeviceError::Cuda(CudaError::OutOfMemory {
        need: said,
        free,
        total,
        device: 0,
        ..
    }) = error
    else {
        panic!("{error}");
    };
    assert_eq!((said, free, total), (need as u64, 1 << 30, 2 << 30));
    assert_eq!(budget.total().current, 0, "what was not had is not counted");
}

#[test]
fn a_machine_without_a_driver_is_no_error() {
    let Probe::Unusable(CudaError::NoDriver { library, reason }) = probe("libcuda-none.so.1")
    else {
        panic!("a library that is nowhere");
    };
    assert_eq!(library, "libcuda-none.so.1");
    assert!(reason.contains("libcuda-none.so.1"), "{reason}");
}

#[test]
fn drivers_that_do_not_do_are_told_apart() {
    let old = Driver::build(&["-DVERSION=11080"]);
    let error = Context::open(&old.path, 0).unwrap_err();
    assert!(
        error.to_string().contains("for CUDA 11.8, needed is 12.0"),
        "{error}"
    );
    let none = Driver::build(&["-DDEVICES=0"]);
    assert!(matches!(
        probe(&none.path),
        Probe::Unusable(CudaError::NoDevice { devices: 0, .. })
    ));
    let lacking = Driver::build(&["-DWITHOUT_REGISTER"]);
    assert!(matches!(
        Context::open(&lacking.path, 0).unwrap_err(),
        CudaError::NoEntry {
            entry: "cuMemHostRegister_v2",
            ..
        }
    ));
    let two = Driver::build(&[]);
    assert!(matches!(probe(&two.path), Probe::Usable { devices: 2, .. }));
    assert!(matches!(
        Context::open(&two.path, 2).unwrap_err(),
        CudaError::NoDevice {
            device: 2,
            devices: 2
        }
    ));
}

#[test]
fn a_compiler_of_a_later_generation_is_refused() {
    let driver = Driver::build(&["-DVERSION=12080"]);
    let context = Context::open(&driver.path, 0).unwrap();
    let version = |major| Version { major, minor: 9 };
    context.check_compiler(version(12)).unwrap();
    let error = context.check_compiler(version(13)).unwrap_err().to_string();
    assert!(error.contains("for CUDA 12.8, needed is 13.0"), "{error}");
}
