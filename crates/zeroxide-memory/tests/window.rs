//! Pages that move: bytes travel with their frames, and nothing is left behind.
#![expect(clippy::unwrap_used, reason = "test helpers")]

use proptest::prelude::*;
use zeroxide_layout::PAGE;
use zeroxide_memory::{
    Arena, Bucket, Budget, FRAME, Frame, FramePool, MemoryError, Window, WindowState,
};

fn pool(frames: usize) -> (Budget, FramePool) {
    let budget = Budget::new(None);
    let pool = FramePool::new(&budget, Bucket::Gathered, frames).unwrap();
    (budget, pool)
}

fn fill(window: &Window, byte: u8) {
    window.lease(0..window.len()).unwrap().fill(byte);
}

fn all(window: &Window, byte: u8) -> bool {
    window
        .lease(0..window.len())
        .unwrap()
        .iter()
        .all(|&b| b == byte)
}

/// The first byte of a frame under the window, and whether all its bytes are that.
fn frame_bytes(window: &Window, frame: usize) -> (u8, bool) {
    let end = ((frame + 1) * FRAME).min(window.len());
    let lease = window.lease(frame * FRAME..end).unwrap();
    (lease[0], lease.iter().all(|&byte| byte == lease[0]))
}

#[test]
fn bytes_travel_with_the_frames() {
    let (_, pool) = pool(3);
    let mut first = Window::reserve(3 * FRAME).unwrap();
    let mut second = Window::reserve(3 * FRAME).unwrap();
    assert_eq!(first.base().addr() % FRAME, 0);
    first.map(pool.take(3).unwrap()).unwrap();
    assert!(all(&first, 0));
    for frame in 0..3 {
        first
            .lease(frame * FRAME..(frame + 1) * FRAME)
            .unwrap()
            .fill(1 + u8::try_from(frame).unwrap());
    }
    let mut frames = first.unmap().unwrap();
    frames.reverse();
    second.map(frames).unwrap();
    assert_eq!(
        [0, 1, 2].map(|frame| frame_bytes(&second, frame)),
        [(3, true), (2, true), (1, true)]
    );
    let mut frames = second.unmap().unwrap();
    frames.reverse();
    first.map(frames).unwrap();
    assert_eq!(
        [0, 1, 2].map(|frame| frame_bytes(&first, frame)),
        [(1, true), (2, true), (3, true)]
    );
}

#[test]
fn a_window_shorter_than_its_frames_ends_where_it_was_asked_to() {
    let (_, pool) = pool(2);
    let mut window = Window::reserve(FRAME + 1).unwrap();
    assert_eq!((window.len(), window.frames()), (FRAME + PAGE, 2));
    window.map(pool.take(2).unwrap()).unwrap();
    fill(&window, 9);
    let past = window.lease(FRAME..FRAME + PAGE + 1);
    assert!(matches!(past, Err(MemoryError::OutOfRange { len, .. }) if len == FRAME + PAGE));
}

#[test]
fn states_refuse_what_they_cannot_do() {
    let (budget, pool) = pool(2);
    let mut window = Window::reserve(FRAME).unwrap();
    assert_eq!(window.state().unwrap(), WindowState::Empty);
    assert!(matches!(
        window.lease(0..1),
        Err(MemoryError::WrongState {
            state: WindowState::Empty,
            ..
        })
    ));
    assert!(matches!(
        window.unmap(),
        Err(MemoryError::WrongState {
            state: WindowState::Empty,
            ..
        })
    ));
    let short = window.map(Vec::new());
    assert!(matches!(
        short,
        Err(MemoryError::FrameCount { need: 1, got: 0 })
    ));
    let long = window.map(pool.take(2).unwrap());
    assert!(matches!(
        long,
        Err(MemoryError::FrameCount { need: 1, got: 2 })
    ));
    assert_eq!(pool.free(), 2, "refused frames go back to their pool");

    window.map(pool.take(1).unwrap()).unwrap();
    assert_eq!(window.state().unwrap(), WindowState::Mapped);
    let again = window.map(pool.take(1).unwrap());
    assert!(matches!(
        again,
        Err(MemoryError::WrongState {
            state: WindowState::Mapped,
            ..
        })
    ));
    let home = window.make_home(&budget, Bucket::Weights);
    assert!(matches!(
        home,
        Err(MemoryError::WrongState {
            state: WindowState::Mapped,
            ..
        })
    ));
    drop(window.unmap().unwrap());
    assert_eq!(window.state().unwrap(), WindowState::Empty);

    window.make_home(&budget, Bucket::Weights).unwrap();
    assert_eq!(window.state().unwrap(), WindowState::Home);
    assert!(matches!(
        window.unmap(),
        Err(MemoryError::WrongState {
            state: WindowState::Home,
            ..
        })
    ));
    let map = window.map(pool.take(1).unwrap());
    assert!(matches!(
        map,
        Err(MemoryError::WrongState {
            state: WindowState::Home,
            ..
        })
    ));
    assert!(Window::reserve(0).is_err() && Window::reserve(usize::MAX).is_err());
}

#[test]
fn memory_of_its_own_is_zeroed_counted_and_given_back() {
    let budget = Budget::new(None);
    let mut window = Window::reserve(FRAME + PAGE).unwrap();
    window.make_home(&budget, Bucket::Weights).unwrap();
    assert_eq!(budget.usage(Bucket::Weights).current, (FRAME + PAGE) as u64);
    assert!(all(&window, 0));
    fill(&window, 5);
    assert!(all(&window, 5));
    drop(window);
    assert_eq!(budget.total().current, 0);
}

#[test]
fn a_leased_window_stays_mapped() {
    let (_, pool) = pool(1);
    let mut window = Window::reserve(FRAME).unwrap();
    window.map(pool.take(1).unwrap()).unwrap();
    let mut lease = window.lease(PAGE..3 * PAGE).unwrap();
    let busy = window.lease(2 * PAGE..4 * PAGE);
    assert!(matches!(busy, Err(MemoryError::RangeBusy { .. })));
    let beside = window.lease(3 * PAGE..4 * PAGE).unwrap();
    assert!(
        matches!(window.unmap(), Err(MemoryError::LeasesAlive { bytes, .. }) if bytes == 3 * PAGE)
    );
    lease.fill(3);
    drop((lease, beside));
    window.unmap().unwrap();
}

#[test]
fn a_lease_outlives_its_window() {
    let (budget, pool) = pool(2);
    let mut window = Window::reserve(2 * FRAME).unwrap();
    window.map(pool.take(2).unwrap()).unwrap();
    let mut lease = window.lease(0..2 * FRAME).unwrap();
    drop(window);
    assert_eq!(pool.free(), 0, "frames under a lease are not handed out");
    lease.fill(8);
    assert!(lease.iter().all(|&byte| byte == 8));
    drop(lease);
    assert_eq!(pool.free(), 2);
    let mut next = Window::reserve(2 * FRAME).unwrap();
    next.map(pool.take(2).unwrap()).unwrap();
    assert!(
        all(&next, 8),
        "pages went home when the last lease was dropped"
    );
    drop(pool);
    assert_eq!(
        budget.total().current,
        2 * FRAME as u64,
        "mapped frames are still counted"
    );
    drop(next);
    assert_eq!(budget.total().current, 0);
}

#[test]
fn frames_are_taken_all_or_none_and_warm_ones_first() {
    let (_, pool) = pool(3);
    assert_eq!(pool.capacity(), 3);
    assert!(pool.take(4).is_none());
    let two = pool.take(2).unwrap();
    assert!(pool.take(2).is_none());
    assert_eq!(pool.free(), 1);
    drop(two);
    assert_eq!(pool.free(), 3);
    assert_eq!(pool.take(0).unwrap().len(), 0);
    let (_, other) = self::pool(2);
    let mut window = Window::reserve(FRAME).unwrap();
    window.map(other.take(1).unwrap()).unwrap();
    fill(&window, 4);
    drop(window.unmap().unwrap());
    window.map(other.take(1).unwrap()).unwrap();
    assert!(
        all(&window, 4),
        "the frame returned last is the one taken next"
    );
}

/// Pages in the process's address range `start..start + len`, from the kernel's page map.
fn resident_pages(start: usize, len: usize) -> usize {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = std::fs::File::open("/proc/self/pagemap").unwrap();
    file.seek(SeekFrom::Start((start / PAGE * 8) as u64))
        .unwrap();
    let mut entries = vec![0; len / PAGE * 8];
    file.read_exact(&mut entries).unwrap();
    // Bit 63 of each little-endian entry: page present.
    entries
        .chunks_exact(8)
        .filter(|entry| entry[7] & 0x80 != 0)
        .count()
}

#[test]
fn pages_are_under_one_window_at_a_time() {
    let (_, pool) = pool(4);
    let mut windows = [
        Window::reserve(4 * FRAME).unwrap(),
        Window::reserve(4 * FRAME).unwrap(),
    ];
    let whole = 4 * FRAME / PAGE;
    for round in 0..6_u8 {
        let active = usize::from(round % 2);
        windows[active].map(pool.take(4).unwrap()).unwrap();
        fill(&windows[active], round);
        let counts = [0, 1].map(|w| resident_pages(windows[w].base().addr(), 4 * FRAME));
        let expected = if active == 0 { [whole, 0] } else { [0, whole] };
        assert_eq!(counts, expected, "round {round}");
        drop(windows[active].unmap().unwrap());
        assert_eq!(resident_pages(windows[active].base().addr(), 4 * FRAME), 0);
    }
}

/// Whether the kernel's mapping at `address` has huge pages advised (`hg` in its flags).
fn huge_pages_advised(address: usize) -> bool {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut here = false;
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or("");
        if let Some((start, end)) = first.split_once('-') {
            let parse = |text| usize::from_str_radix(text, 16).unwrap();
            here = (parse(start)..parse(end)).contains(&address);
        } else if here && let Some(flags) = line.strip_prefix("VmFlags:") {
            return flags.split_whitespace().any(|flag| flag == "hg");
        }
    }
    false
}

#[test]
fn huge_pages_are_advised_wherever_memory_lies() {
    if !std::fs::exists("/sys/kernel/mm/transparent_hugepage").unwrap() {
        return;
    }
    let (budget, pool) = pool(1);
    let arena = Arena::new(&budget, Bucket::Staging, FRAME).unwrap();
    assert!(huge_pages_advised(arena.base().addr()));
    let mut window = Window::reserve(FRAME).unwrap();
    assert!(!huge_pages_advised(window.base().addr()));
    for _ in 0..2 {
        window.map(pool.take(1).unwrap()).unwrap();
        fill(&window, 1);
        assert!(huge_pages_advised(window.base().addr()));
        drop(window.unmap().unwrap());
    }
    window.make_home(&budget, Bucket::Weights).unwrap();
    assert!(huge_pages_advised(window.base().addr()));
}

#[derive(Clone, Debug)]
enum Action {
    Map {
        window: usize,
    },
    Unmap {
        window: usize,
    },
    Write {
        window: usize,
        frame: prop::sample::Index,
        byte: u8,
    },
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        (0..3_usize).prop_map(|window| Action::Map { window }),
        (0..3_usize).prop_map(|window| Action::Unmap { window }),
        (0..3_usize, any::<prop::sample::Index>(), any::<u8>()).prop_map(
            |(window, frame, byte)| Action::Write {
                window,
                frame,
                byte
            }
        ),
    ];
    prop::collection::vec(action, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A stack of frames beside each window, each frame carrying the byte it was last filled with.
    #[test]
    fn windows_follow_the_model(actions in actions()) {
        let (_, pool) = pool(4);
        let sizes = [FRAME, 2 * FRAME - PAGE, 3 * FRAME];
        let mut windows: Vec<Window> = sizes.iter().map(|&size| Window::reserve(size).unwrap()).collect();
        let mut spare: Vec<Frame> = pool.take(4).unwrap();
        let mut spare_bytes = vec![0_u8; 4];
        let mut mapped: Vec<Option<Vec<u8>>> = vec![None; 3];
        for action in actions {
            match action {
                Action::Map { window } if mapped[window].is_none() && windows[window].frames() <= spare.len() => {
                    let rest = spare.len() - windows[window].frames();
                    windows[window].map(spare.split_off(rest)).unwrap();
                    mapped[window] = Some(spare_bytes.split_off(rest));
                }
                Action::Unmap { window } => {
                    let result = windows[window].unmap();
                    prop_assert_eq!(result.is_ok(), mapped[window].is_some());
                    spare.extend(result.into_iter().flatten());
                    spare_bytes.extend(mapped[window].take().into_iter().flatten());
                }
                Action::Write { window, frame, byte } => {
                    if let Some(bytes) = &mut mapped[window] {
                        let frame = frame.index(bytes.len());
                        let end = ((frame + 1) * FRAME).min(windows[window].len());
                        windows[window].lease(frame * FRAME..end).unwrap().fill(byte);
                        // The tail of a short window's last frame keeps its bytes.
                        bytes[frame] = byte;
                    }
                }
                Action::Map { .. } => {}
            }
            for (window, bytes) in windows.iter().zip(&mapped) {
                let Some(bytes) = bytes else { continue };
                for (frame, byte) in bytes.iter().enumerate() {
                    let end = ((frame + 1) * FRAME).min(window.len());
                    let lease = window.lease(frame * FRAME..end).unwrap();
                    prop_assert_eq!(lease[0], *byte);
                    prop_assert_eq!(lease[FRAME - PAGE - 1], *byte);
                }
            }
        }
    }
}

/// Catches: a page that stays readable under the window, bytes lost on the way, frames that cannot be given up from beside.
#[test]
fn what_was_withdrawn_is_leased_beside_and_comes_back() {
    let (_, pool) = pool(2);
    let mut window = Window::reserve(2 * FRAME).unwrap();
    window.map(pool.take(2).unwrap()).unwrap();
    fill(&window, 7);
    let held = window.lease(0..1).unwrap();
    assert!(matches!(
        window.withdraw(),
        Err(MemoryError::LeasesAlive { .. })
    ));
    drop(held);
    for round in 0..3 {
        window.withdraw().unwrap();
        assert_eq!(window.state().unwrap(), WindowState::Loading);
        assert!(all(&window, 7 + round));
        let lease = window.lease(0..1).unwrap();
        assert_eq!(lease.as_ptr().cast_mut(), window.beside());
        drop(lease);
        fill(&window, 8 + round);
        window.publish().unwrap();
        assert_eq!(window.state().unwrap(), WindowState::Mapped);
        assert!(all(&window, 8 + round));
    }
    window.withdraw().unwrap();
    drop(window.unmap().unwrap());
    assert_eq!(pool.free(), 2);
    assert_eq!(window.state().unwrap(), WindowState::Empty);
    assert!(window.withdraw().is_err());
}
