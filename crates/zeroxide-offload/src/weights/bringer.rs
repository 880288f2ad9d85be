//! Between a reader whose weights have to come from other ranks and whoever can bring them.
//!
//! The net's thread asks; a thread of the caller's, who knows the other ranks, listens, brings and answers. The reader
//! sleeps meanwhile, and with it everything that its thread has locked. So the errand has to be taken up within a time:
//! a listener that is kept from it, as by a lock of the interpreter that the reader holds, must not keep both for ever.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long an errand waits until it is taken up.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, PartialEq, Eq)]
enum Errand {
    /// Nobody has listened yet.
    Unheard,
    /// Somebody listens.
    Listening,
    /// A reader waits for the unit.
    Wanted(usize),
    /// Somebody is bringing it.
    Taken,
    /// It is there, or why it is not.
    Answered(Result<(), String>),
    /// Nobody will listen again; no other state follows, however late a listener comes back from its last errand.
    Ended,
}

/// One errand at a time, since readers are served one after the other.
#[derive(Debug)]
pub struct Bringer {
    errand: Mutex<Errand>,
    changed: Condvar,
}

impl Bringer {
    pub(crate) fn new() -> Self {
        Self {
            errand: Mutex::new(Errand::Unheard),
            changed: Condvar::new(),
        }
    }

    /// Waits until a reader wants something; false once nobody will any more.
    pub fn listen(&self) -> bool {
        let mut errand = self.lock();
        if *errand == Errand::Unheard {
            *errand = Errand::Listening;
        }
        loop {
            match *errand {
                Errand::Wanted(_) => return true,
                Errand::Ended => return false,
                _ => errand = self.wait(errand),
            }
        }
    }

    /// Takes up the errand: the unit that is wanted, or `None` where the reader has given up.
    pub fn take(&self) -> Option<usize> {
        let mut errand = self.lock();
        let Errand::Wanted(unit) = *errand else {
            return None;
        };
        self.set(&mut errand, Errand::Taken);
        Some(unit)
    }

    /// Ends an errand that was taken up: the unit can be read, or why it cannot.
    pub fn answer(&self, outcome: Result<(), String>) {
        let mut errand = self.lock();
        if *errand == Errand::Taken {
            self.set(&mut errand, Errand::Answered(outcome));
        }
    }

    /// Nobody listens any more, and nobody needs to.
    pub fn close(&self) {
        let mut errand = self.lock();
        self.set(&mut errand, Errand::Ended);
    }

    /// Has the unit brought; returns when it can be read. The error says why it cannot.
    pub(crate) fn ask(&self, unit: usize) -> Result<(), String> {
        let begun = Instant::now();
        let mut errand = self.lock();
        if *errand != Errand::Listening {
            return Err("its parts are on several ranks".into());
        }
        self.set(&mut errand, Errand::Wanted(unit));
        loop {
            match &*errand {
                Errand::Wanted(_) => {
                    let left = PATIENCE.saturating_sub(begun.elapsed());
                    if left.is_zero() {
                        *errand = Errand::Listening;
                        return Err(
                            "its parts are on several ranks, and the reader kept Python's lock, as item() and tolist() do"
                                .into(),
                        );
                    }
                    let woken = self.changed.wait_timeout(errand, left);
                    errand = woken.unwrap_or_else(PoisonError::into_inner).0;
                }
                Errand::Answered(outcome) => {
                    let outcome = outcome.clone();
                    *errand = Errand::Listening;
                    return outcome;
                }
                Errand::Taken => errand = self.wait(errand),
                Errand::Ended | Errand::Unheard | Errand::Listening => {
                    return Err("the engine has ended".into());
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Errand> {
        // No operation leaves it half changed.
        self.errand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, errand: MutexGuard<'a, Errand>) -> MutexGuard<'a, Errand> {
        self.changed
            .wait(errand)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, errand: &mut Errand, next: Errand) {
        *errand = next;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};
    use std::thread;

    use super::*;

    /// Catches: an answer that reaches nobody or the wrong errand, a listener that is not woken at the end.
    #[test]
    fn every_errand_gets_its_own_answer_until_the_end() {
        let bringer = Arc::new(Bringer::new());
        assert!(bringer.ask(0).is_err(), "nobody listens yet");
        let served = Arc::clone(&bringer);
        let listener = thread::spawn(move || {
            let mut seen = Vec::new();
            while served.listen() {
                let unit = served.take().expect("one asks, and waits");
                seen.push(unit);
                served.answer(if unit == 2 {
                    Err("lost".into())
                } else {
                    Ok(())
                });
            }
            seen
        });
        while *bringer.lock() == Errand::Unheard {
            thread::yield_now();
        }
        assert_eq!(bringer.ask(1), Ok(()));
        assert_eq!(bringer.ask(2), Err("lost".into()));
        assert_eq!(bringer.ask(3), Ok(()));
        bringer.close();
        assert_eq!(listener.join().expect("no panic"), [1, 2, 3]);
        assert!(bringer.ask(4).is_err(), "nobody listens any more");
    }

    /// Catches: a listener that comes after the end, or comes back after it, and waits for ever.
    #[test]
    fn nobody_listens_after_the_end() {
        let bringer = Arc::new(Bringer::new());
        bringer.close();
        let (sender, receiver) = mpsc::channel();
        let late = Arc::clone(&bringer);
        thread::spawn(move || {
            for _ in 0..2 {
                sender.send(late.listen()).expect("the test waits");
            }
        });
        for _ in 0..2 {
            assert_eq!(receiver.recv_timeout(PATIENCE), Ok(false));
        }
        assert!(bringer.ask(0).is_err());
    }

    /// Catches: a reader that waits for ever after the end.
    #[test]
    fn the_end_lets_a_reader_go() {
        let bringer = Arc::new(Bringer::new());
        let served = Arc::clone(&bringer);
        let listener = thread::spawn(move || served.listen() && served.take().is_some());
        while *bringer.lock() == Errand::Unheard {
            thread::yield_now();
        }
        let asking = Arc::clone(&bringer);
        let reader = thread::spawn(move || asking.ask(7));
        assert!(listener.join().expect("no panic"), "it took the errand up");
        bringer.close();
        assert!(reader.join().expect("no panic").is_err());
    }
}
