//! A fixed address range under which memory comes and goes.
#![expect(unsafe_code, reason = "changes what lies under an address range")]

use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;

use zeroxide_layout::{PAGE, checked_align_up_usize};

use crate::frames::{FRAME, Frame};
use crate::free_list::FreeList;
use crate::map::Mapping;
use crate::region::{Backing, Region};
use crate::{Bucket, Budget, Lease, MemoryError, SharedSegment};

/// Where the bytes of a window are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WindowState {
    /// Nowhere: no memory is used and any access faults.
    Empty,
    /// In frames of a [`FramePool`](crate::FramePool), which operations fill beside the window: any access to the window
    /// itself faults until [`Window::publish`].
    Loading,
    /// In frames of a [`FramePool`](crate::FramePool), whose pages lie under the window until
    /// [`Window::unmap`].
    Mapped,
    /// In memory of the window's own, until the window is gone.
    Home,
}

impl fmt::Display for WindowState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "empty",
            Self::Loading => "loading",
            Self::Mapped => "mapped",
            Self::Home => "home",
        })
    }
}

/// A fixed, 2 MiB aligned address range for one unit's flat weights.
///
/// Tensors are made once over [`base`](Window::base) and keep their address; which memory lies under
/// them is decided by [`map`](Window::map), [`load`](Window::load) with [`publish`](Window::publish),
/// [`unmap`](Window::unmap) and [`make_home`](Window::make_home). Whoever uses those addresses has to know that the
/// window is mapped, and must not touch a range that a [`Lease`] owns.
///
/// When the window is dropped while leases on it are alive, its memory stays until the last of them is
/// gone.
#[derive(Debug)]
pub struct Window {
    region: Arc<Region>,
    /// Where frames lie while they are loading: addresses that nobody but operations has.
    behind: Arc<Region>,
    len: usize,
}

/// Keeps a window's address range from being given to anyone else, for those who hold its addresses.
#[derive(Clone, Debug)]
pub struct Anchor {
    _region: Arc<Region>,
}

impl Window {
    /// Reserves addresses for `bytes` (rounded up to 4 KiB). Uses no memory.
    ///
    /// # Errors
    /// [`MemoryError::InvalidRequest`] for 0 bytes, [`MemoryError::Os`].
    pub fn reserve(bytes: usize) -> Result<Self, MemoryError> {
        let invalid = || MemoryError::InvalidRequest {
            what: "window size",
            got: bytes,
            expected: "more than 0",
        };
        let len = checked_align_up_usize(bytes, PAGE).ok_or_else(invalid)?;
        let whole = checked_align_up_usize(len, FRAME)
            .filter(|&n| n > 0)
            .ok_or_else(invalid)?;
        let region = || -> Result<_, MemoryError> {
            Ok(Region::new(Mapping::reserve(whole)?, len, Backing::Empty))
        };
        Ok(Self {
            region: region()?,
            behind: region()?,
            len,
        })
    }

    /// First byte. The address never changes; there is memory under it only while the window
    /// [`is_mapped`](Window::is_mapped).
    pub fn base(&self) -> *mut u8 {
        self.region.base().as_ptr()
    }

    /// Keeps the address range reserved after the window is gone; the memory under it, too, if it is the
    /// window's own.
    pub fn anchor(&self) -> Anchor {
        Anchor {
            _region: Arc::clone(&self.region),
        }
    }

    /// As [`anchor`](Window::anchor), for the addresses [`beside`](Window::beside) the window.
    pub fn anchor_beside(&self) -> Anchor {
        Anchor {
            _region: Arc::clone(&self.behind),
        }
    }

    /// Bytes, a multiple of 4 KiB.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the window has no bytes, which none has.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of the frames.
    fn whole(&self) -> usize {
        self.frames() * FRAME
    }

    /// Frames that [`map`](Window::map) needs.
    pub fn frames(&self) -> usize {
        self.len.div_ceil(FRAME)
    }

    /// Where the bytes are.
    ///
    /// # Errors
    /// [`MemoryError::Forked`].
    pub fn state(&self) -> Result<WindowState, MemoryError> {
        Ok(match self.region.lock()?.backing {
            Backing::Empty if self.is_loading()? => WindowState::Loading,
            Backing::Empty => WindowState::Empty,
            Backing::Frames(_) => WindowState::Mapped,
            Backing::Owned(_) => WindowState::Home,
        })
    }

    /// Whether there is memory under the window, from frames or of its own. False in a forked child.
    pub fn is_mapped(&self) -> bool {
        self.state()
            .is_ok_and(|state| matches!(state, WindowState::Mapped | WindowState::Home))
    }

    fn is_loading(&self) -> Result<bool, MemoryError> {
        Ok(matches!(self.behind.lock()?.backing, Backing::Frames(_)))
    }

    /// Moves the pages of `frames` under the window, in their order. The bytes are those the frames last
    /// held, zero at first.
    ///
    /// # Errors
    /// [`MemoryError::FrameCount`] unless the frames cover the window exactly,
    /// [`MemoryError::WrongState`] unless the window is empty, [`MemoryError::Forked`], or
    /// [`MemoryError::Os`]. After any of them the window is as it was and the frames are back in their
    /// pool; after the last, their bytes are undefined, and frames that the kernel refuses to move back
    /// are lost to the pool (and stay counted).
    pub fn map(&mut self, frames: Vec<Frame>) -> Result<(), MemoryError> {
        self.expect(WindowState::Empty, "map", "empty")?;
        put(&self.region, frames, self.frames())
    }

    /// Takes `frames` as [`map`](Window::map) does, but keeps them beside the window: leases are given on them, and any
    /// access to the window's own addresses goes on faulting, so that nobody sees half of what is being filled in.
    ///
    /// # Errors
    /// As [`map`](Window::map).
    pub fn load(&mut self, frames: Vec<Frame>) -> Result<(), MemoryError> {
        self.expect(WindowState::Empty, "load", "empty")?;
        put(&self.behind, frames, self.frames())
    }

    /// Moves the pages of what was loaded under the window.
    ///
    /// # Errors
    /// [`MemoryError::WrongState`] unless frames are loading, [`MemoryError::LeasesAlive`] while an operation owns a part
    /// of them, [`MemoryError::Forked`], or [`MemoryError::Os`]: then they are loading still, with undefined bytes.
    pub fn publish(&mut self) -> Result<(), MemoryError> {
        self.expect(WindowState::Loading, "publish", "loading")?;
        self.exchange_pages(&self.behind, &self.region, "publish")
    }

    /// Moves the pages under the window back beside it, as if they were loading still: they are about to change, and nobody
    /// may see that half done. The bytes stay as they are.
    ///
    /// # Errors
    /// [`MemoryError::WrongState`] unless frames are mapped, [`MemoryError::LeasesAlive`] while an operation owns a part of
    /// them, [`MemoryError::Forked`], or [`MemoryError::Os`]: then they are mapped still, with undefined bytes.
    pub fn withdraw(&mut self) -> Result<(), MemoryError> {
        self.expect(WindowState::Mapped, "withdraw", "mapped")?;
        let (window, beside) = (self.region.mapping(), self.behind.mapping());
        check_free(&self.region.lock()?.free, "withdraw")?;
        forbid(window)?;
        let moved = self.exchange_pages(&self.region, &self.behind, "withdraw");
        permit(if moved.is_ok() { beside } else { window }, 0, self.whole())?;
        moved?;
        seal(window)
    }

    /// Moves all pages and their frames from one of the two regions to the other, which is empty.
    fn exchange_pages(
        &self,
        source: &Region,
        target: &Region,
        operation: &'static str,
    ) -> Result<(), MemoryError> {
        let mut given = source.lock()?;
        check_free(&given.free, operation)?;
        let mut taking = target.lock()?;
        let (from, to) = (source.mapping(), target.mapping());
        for index in 0..self.frames() {
            // SAFETY: no lease is alive on the source, whose addresses are unused or about to fault on purpose; an empty
            // region has no lease, and its addresses are unused by the window's contract.
            let moved = unsafe { from.move_pages(index * FRAME, FRAME, to, index * FRAME) };
            if let Err(error) = moved {
                for back in 0..index {
                    // SAFETY: as above, the other way round. Should this fail too, the bytes are lost, as said.
                    let _ = unsafe { to.move_pages(back * FRAME, FRAME, from, back * FRAME) };
                }
                let _ = seal(to);
                return Err(error);
            }
        }
        taking.backing = std::mem::replace(&mut given.backing, Backing::Empty);
        Ok(())
    }

    /// Where what is loading lies: addresses that are this process's own, for those who fill it in. As many bytes as the
    /// window; there is memory under them only while the window is loading.
    pub fn beside(&self) -> *mut u8 {
        self.behind.base().as_ptr()
    }

    /// Puts zeroed memory under an empty window, until frames come or [`unmap`](Window::unmap) takes those away: for a
    /// thread that reads there and cannot be stopped. It is not counted in any budget, and the window stays empty.
    ///
    /// # Errors
    /// [`MemoryError::WrongState`] unless the window is empty or loading, [`MemoryError::Forked`], [`MemoryError::Os`].
    pub fn blank(&self) -> Result<(), MemoryError> {
        let state = self.region.lock()?;
        if !matches!(state.backing, Backing::Empty) {
            return Err(MemoryError::WrongState {
                operation: "blank",
                state: WindowState::Mapped,
                expected: "empty",
            });
        }
        // SAFETY: an empty window has no lease, and what reads there gets zeros instead of a fault.
        unsafe { self.region.mapping().commit(self.len) }
    }

    /// Puts memory of ones under an empty window, for good: every float there is NaN. For readers that stay when nobody can
    /// bring anything any more; like [`blank`](Window::blank), it is not counted.
    ///
    /// # Errors
    /// As [`blank`](Window::blank).
    pub fn ruin(&self) -> Result<(), MemoryError> {
        self.blank()?;
        // SAFETY: the memory was put there just now, for as long as the region is; an empty window has no lease.
        unsafe { self.base().write_bytes(0xff, self.len) };
        Ok(())
    }

    /// Takes what [`blank`](Window::blank) has put there away again.
    ///
    /// # Errors
    /// [`MemoryError::Forked`], [`MemoryError::Os`].
    pub fn unblank(&self) -> Result<(), MemoryError> {
        let state = self.region.lock()?;
        if matches!(state.backing, Backing::Empty) {
            seal(self.region.mapping())?;
        }
        Ok(())
    }

    /// Moves the pages back to their frames and returns these; any access to the window faults
    /// afterwards. The frames keep their bytes.
    ///
    /// # Errors
    /// [`MemoryError::WrongState`] unless frames are mapped or loading, [`MemoryError::LeasesAlive`] while an
    /// operation owns a part of the window, [`MemoryError::Forked`], or [`MemoryError::Os`]: then the
    /// window is still mapped, with undefined bytes, and the call can be repeated.
    pub fn unmap(&mut self) -> Result<Vec<Frame>, MemoryError> {
        let region = match self.state()? {
            WindowState::Loading => &self.behind,
            WindowState::Mapped => &self.region,
            state => {
                return Err(MemoryError::WrongState {
                    operation: "unmap",
                    state,
                    expected: "mapped or loading",
                });
            }
        };
        let mut state = region.lock()?;
        check_free(&state.free, "unmap")?;
        let Backing::Frames(frames) = &state.backing else {
            return Ok(Vec::new());
        };
        // Before any page moves: what has moved reads as zero, and a reader on another thread must fault instead.
        forbid(region.mapping())?;
        let moved = move_home(region.mapping(), frames);
        if moved.is_err() {
            permit(region.mapping(), 0, self.whole())?;
        }
        for frame in frames {
            let (home, offset) = frame.home();
            permit(home, offset, FRAME)?;
        }
        moved?;
        seal(region.mapping())?;
        match std::mem::replace(&mut state.backing, Backing::Empty) {
            Backing::Frames(frames) => Ok(frames),
            Backing::Empty | Backing::Owned(_) => Ok(Vec::new()),
        }
    }

    /// Puts memory of its own under the window, zeroed and for good, with huge pages advised. Its bytes
    /// (those of [`len`](Window::len)) count in `bucket` until the window is gone.
    ///
    /// # Errors
    /// [`MemoryError::WrongState`] unless the window is empty, [`MemoryError::OverBudget`],
    /// [`MemoryError::Forked`], [`MemoryError::Os`].
    pub fn make_home(&mut self, budget: &Budget, bucket: Bucket) -> Result<(), MemoryError> {
        self.expect(WindowState::Empty, "make home of", "empty")?;
        let mut state = self.region.lock()?;
        let reservation = budget.reserve(bucket, self.len as u64)?;
        // SAFETY: an empty window has no lease, and addresses from `base` are unused by its contract.
        unsafe { self.region.mapping().commit(self.len) }?;
        state.backing = Backing::Owned(reservation);
        Ok(())
    }

    /// Puts payload bytes of `segment`, from `offset` (a multiple of 4 KiB) on, under the window, for good. They count in
    /// `bucket` until the window is gone, in every process that does this: resident memory counts so, too.
    ///
    /// What a lease on the window owns is then only this process's part of an agreement between all that map the
    /// segment: who may write which bytes when.
    ///
    /// # Errors
    /// As [`make_home`](Self::make_home), and [`MemoryError::OutOfRange`] when the segment is too short.
    pub fn make_shared_home(
        &mut self,
        budget: &Budget,
        bucket: Bucket,
        segment: &SharedSegment,
        offset: usize,
    ) -> Result<(), MemoryError> {
        self.expect(WindowState::Empty, "make home of", "empty")?;
        let mut state = self.region.lock()?;
        if !offset.is_multiple_of(PAGE) || offset + self.len > segment.payload() {
            return Err(MemoryError::OutOfRange {
                start: offset,
                end: offset + self.len,
                len: segment.payload(),
            });
        }
        let reservation = budget.reserve(bucket, self.len as u64)?;
        // SAFETY: an empty window has no lease, and addresses from `base` are unused by its contract.
        unsafe {
            self.region.mapping().commit_shared(
                self.len,
                segment.file(),
                segment.payload_offset() + offset,
            )
        }?;
        state.backing = Backing::Owned(reservation);
        Ok(())
    }

    /// Leases `range` (bytes of the window) to an operation that reads or writes it in place.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] for an empty range or one outside the window,
    /// [`MemoryError::WrongState`] when there is no memory under the window,
    /// [`MemoryError::RangeBusy`] when a live lease overlaps it, [`MemoryError::Forked`].
    pub fn lease(&self, range: Range<usize>) -> Result<Lease, MemoryError> {
        let region = if self.is_loading()? {
            &self.behind
        } else {
            &self.region
        };
        let mut state = region.lock()?;
        let Range { start, end } = range;
        if start >= end || end > self.len {
            return Err(MemoryError::OutOfRange {
                start,
                end,
                len: self.len,
            });
        }
        if matches!(state.backing, Backing::Empty) {
            return Err(MemoryError::WrongState {
                operation: "lease from",
                state: WindowState::Empty,
                expected: "mapped or home",
            });
        }
        if !state.free.take(start..end) {
            return Err(MemoryError::RangeBusy { start, end });
        }
        Ok(Lease::new(Arc::clone(region), start..end))
    }

    fn expect(
        &self,
        wanted: WindowState,
        operation: &'static str,
        expected: &'static str,
    ) -> Result<(), MemoryError> {
        let state = self.state()?;
        if state == wanted {
            return Ok(());
        }
        Err(MemoryError::WrongState {
            operation,
            state,
            expected,
        })
    }
}

/// Moves the pages of `frames` under an empty region.
fn put(region: &Region, frames: Vec<Frame>, need: usize) -> Result<(), MemoryError> {
    let mut state = region.lock()?;
    if frames.len() != need {
        return Err(MemoryError::FrameCount {
            need,
            got: frames.len(),
        });
    }
    let target = region.mapping();
    let mut moved = 0;
    let result = frames.iter().enumerate().try_for_each(|(index, frame)| {
        let (home, offset) = frame.home();
        // SAFETY: a frame's slot is reachable through the frame alone, and an empty region has no
        // lease; addresses from `base` are unused by its contract.
        unsafe { home.move_pages(offset, FRAME, target, index * FRAME) }?;
        moved += 1;
        Ok(())
    });
    if let Err(error) = result {
        let mut frames = frames;
        frames.truncate(moved);
        if move_home(target, &frames).is_err() {
            // Their homes may be unusable: the pool must not hand them out. They stay counted.
            let _kept = ManuallyDrop::new(frames);
        }
        // Should this fail too, the window still counts as empty: no lease is given on it.
        let _ = seal(target);
        return Err(error);
    }
    state.backing = Backing::Frames(frames);
    Ok(())
}

/// Refuses while an operation owns a part of a region.
fn check_free(free: &FreeList, operation: &'static str) -> Result<(), MemoryError> {
    match free.taken() {
        0 => Ok(()),
        bytes => Err(MemoryError::LeasesAlive { operation, bytes }),
    }
}

/// Moves the pages under the window's first frames back to where the frames live. Called with no lease
/// alive: under the region's lock after checking it, or when the region is dropped.
pub(crate) fn move_home(window: &Mapping, frames: &[Frame]) -> Result<(), MemoryError> {
    frames.iter().enumerate().try_for_each(|(index, frame)| {
        let (home, offset) = frame.home();
        // SAFETY: no lease is alive, and the home slot is reachable through the frame alone.
        unsafe { window.move_pages(index * FRAME, FRAME, home, offset) }
    })
}

/// Makes any access fault, pages and all: others may read a window that they have an address of. Called with no lease alive.
fn forbid(window: &Mapping) -> Result<(), MemoryError> {
    // SAFETY: no lease is alive; a use of `base` from here on is what the fault is for.
    unsafe { window.forbid() }
}

/// Lets pages that were moved while they were forbidden, or stayed after all, be used again.
fn permit(mapping: &Mapping, offset: usize, len: usize) -> Result<(), MemoryError> {
    // SAFETY: what was forbidden was forbidden by this file, for the time of a move, which is over.
    unsafe { mapping.permit(offset, len) }
}

/// Makes any access to the window fault. Called with no lease alive.
fn seal(window: &Mapping) -> Result<(), MemoryError> {
    // SAFETY: no lease is alive; a use of `base` from here on is what the fault is for.
    unsafe { window.seal() }
}
