//! Turns of calls and of the thread that goes on with a step, under schedules that a scheduler draws.
//!
//! The source is the crate's own, with locks and threads that the scheduler knows. The state stands for a step of some
//! tiles: what calls and the thread may do with it is counted, and reads of tiles end when a thread of the disk says so.
//! A schedule in which all sleep is reported as a deadlock, so that no notice may be missing.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "parts of the crate, of which this program uses some"
)]

#[path = "../../../zeroxide-storage/src/queue/notify.rs"]
mod notify;
mod sync;
#[path = "../../src/step/turns.rs"]
mod turns;

use std::env;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::Condvar;
use shuttle::thread;
use shuttle::{Config, MaxSteps, Runner};
use sync::{Arc, AtomicBool, AtomicUsize, Mutex, Notify, Ordering};
use turns::{Ahead, Turns};

const TILES: usize = 3;

/// Schedules of each kind; more with `ZEROXIDE_SCHEDULES`.
#[expect(
    clippy::disallowed_methods,
    reason = "who runs the tests says how long"
)]
fn schedules() -> usize {
    let asked = env::var("ZEROXIDE_SCHEDULES").ok();
    asked.map_or(2000, |count| count.parse().expect("a number of schedules"))
}

/// Runs `act` under schedules drawn evenly, and under such in which few changes of turn decide (PCT, Burckhardt et al.,
/// ASPLOS 2010).
fn explore(act: impl Fn() + Send + Sync + Copy + 'static) {
    let mut config = Config::new();
    config.max_steps = MaxSteps::FailAfter(50_000);
    Runner::new(RandomScheduler::new(schedules()), config.clone()).run(act);
    Runner::new(PctScheduler::new(3, schedules()), config).run(act);
}

/// A disk: it has read so many tiles, and tells of each.
#[derive(Default)]
struct Disk {
    asked: AtomicUsize,
    read: AtomicUsize,
}

/// A step of some tiles.
struct State {
    disk: Arc<Disk>,
    /// Tiles to update; 0 where no step is under way.
    left: usize,
    taken: usize,
    /// Told when a step ends.
    ended: Arc<(Mutex<usize>, Condvar)>,
    /// Turns of the thread since a call was announced that has not come to the lock yet.
    behind: Arc<AtomicUsize>,
    waits: Arc<AtomicBool>,
}

impl State {
    /// A step begins: its reads are asked for.
    fn begin(&mut self) {
        assert_eq!(self.left, 0, "a step is under way");
        self.left = TILES;
        self.disk.asked.fetch_add(TILES, Ordering::SeqCst);
    }

    /// Updates a tile that has been read. Returns whether there was one and more are left.
    fn update(&mut self) -> bool {
        if self.left == 0 || self.disk.read.load(Ordering::SeqCst) == self.taken {
            return false;
        }
        self.taken += 1;
        self.left -= 1;
        if self.left == 0 {
            *self.ended.0.lock().expect("nobody panics under it") += 1;
            self.ended.1.notify_all();
        }
        self.left > 0
    }
}

impl Ahead for State {
    fn go_ahead(&mut self) -> bool {
        if self.waits.load(Ordering::SeqCst) {
            let behind = self.behind.fetch_add(1, Ordering::SeqCst);
            assert_eq!(behind, 0, "the thread has a second turn while a call waits");
        }
        self.update()
    }
}

/// An engine with its state, its thread and a disk.
struct Engine {
    turns: Turns,
    state: Arc<Mutex<Option<State>>>,
    disk: Arc<Disk>,
    notify: Arc<Notify>,
    ended: Arc<(Mutex<usize>, Condvar)>,
    behind: Arc<AtomicUsize>,
    waits: Arc<AtomicBool>,
}

impl Engine {
    fn new() -> Arc<Self> {
        let (disk, notify) = (Arc::<Disk>::default(), Arc::<Notify>::default());
        let ended = Arc::new((Mutex::new(0), Condvar::new()));
        let (behind, waits) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let state = Arc::new(Mutex::new(Some(State {
            disk: Arc::clone(&disk),
            left: 0,
            taken: 0,
            ended: Arc::clone(&ended),
            behind: Arc::clone(&behind),
            waits: Arc::clone(&waits),
        })));
        let turns = Turns::start(Arc::clone(&notify), Arc::downgrade(&state)).expect("a thread");
        Arc::new(Self {
            turns,
            state,
            disk,
            notify,
            ended,
            behind,
            waits,
        })
    }

    /// A call, as the crate makes them: announced before the lock is asked for, and over after it is given back.
    fn call(&self, work: impl FnOnce(&mut State)) {
        let present = self.turns.call();
        let mut guard = self.state.lock().expect("no call panics");
        let state = guard.as_mut().expect("open");
        work(state);
        present.leaves(state.left > 0);
        drop(guard);
    }

    /// A thread of the disk: reads `tiles`, and tells of each.
    fn read(self: &Arc<Self>, tiles: usize) -> thread::JoinHandle<()> {
        let engine = Arc::clone(self);
        thread::spawn(move || {
            let mut read = 0;
            while read < tiles {
                if engine.disk.asked.load(Ordering::SeqCst) > read {
                    read += 1;
                    engine.disk.read.store(read, Ordering::SeqCst);
                    engine.notify.notify_one();
                } else {
                    thread::yield_now();
                }
            }
        })
    }

    /// Waits until so many steps have ended, without a call.
    fn wait_for(&self, steps: usize) {
        let mut ended = self.ended.0.lock().expect("nobody panics under it");
        while *ended < steps {
            ended = self.ended.1.wait(ended).expect("nobody panics under it");
        }
    }
}

/// Catches: a step that stands still until somebody calls, because the last call to end knew of none, or because a notice
/// came while a call kept the thread away.
#[test]
fn a_step_ends_whichever_call_is_the_last() {
    explore(|| {
        let engine = Engine::new();
        let disk = engine.read(TILES);
        let others: Vec<_> = (0..2)
            .map(|_| {
                let engine = Arc::clone(&engine);
                thread::spawn(move || engine.call(|_| {}))
            })
            .collect();
        engine.call(State::begin);
        engine.wait_for(1);
        for thread in others.into_iter().chain([disk]) {
            thread.join().expect("no panic");
        }
        engine.turns.end();
    });
}

/// Calls that go on with the step themselves, beside the thread. Catches: a tile that two take, and a step that none ends.
#[test]
fn calls_and_the_thread_share_a_step() {
    explore(|| {
        let engine = Engine::new();
        let disk = engine.read(2 * TILES);
        for step in 1..=2 {
            engine.call(State::begin);
            let helper = {
                let engine = Arc::clone(&engine);
                thread::spawn(move || {
                    engine.call(|state| {
                        state.update();
                    });
                })
            };
            engine.wait_for(step);
            helper.join().expect("no panic");
        }
        disk.join().expect("no panic");
        engine.turns.end();
    });
}

/// Catches: a thread that takes the lock turn after turn from a call that waits for it.
#[test]
fn a_call_waits_for_one_turn_at_the_most() {
    explore(|| {
        let engine = Engine::new();
        let disk = engine.read(TILES);
        engine.call(State::begin);
        {
            let present = engine.turns.call();
            engine.waits.store(true, Ordering::SeqCst);
            let mut guard = engine.state.lock().expect("no call panics");
            engine.waits.store(false, Ordering::SeqCst);
            present.leaves(guard.as_mut().expect("open").left > 0);
            drop(guard);
        }
        engine.wait_for(1);
        disk.join().expect("no panic");
        engine.turns.end();
    });
}

/// Catches: an end that waits for a thread which sleeps, or for one that never sees that it is over.
#[test]
fn the_thread_ends_wherever_a_step_is() {
    explore(|| {
        let engine = Engine::new();
        let disk = engine.read(TILES);
        engine.call(State::begin);
        let other = {
            let engine = Arc::clone(&engine);
            thread::spawn(move || engine.turns.end())
        };
        engine.turns.end();
        other.join().expect("no panic");
        let left = engine.state.lock().expect("no call panics").take();
        assert!(left.expect("open").left <= TILES);
        disk.join().expect("no panic");
    });
}

/// The state goes before its thread is ended. Catches: a thread that keeps it alive, or sleeps for ever.
#[test]
fn a_state_that_is_gone_has_no_more_turns() {
    explore(|| {
        let engine = Engine::new();
        let disk = engine.read(TILES);
        engine.call(State::begin);
        drop(engine.state.lock().expect("no call panics").take());
        disk.join().expect("no panic");
        engine.notify.notify_one();
        engine.turns.end();
    });
}

/// Catches: a notice that is lost because nobody waited when it came, or because another was there.
#[test]
fn a_notice_reaches_its_waiter() {
    explore(|| {
        let notify = Arc::new(Notify::default());
        let done = Arc::new(AtomicUsize::new(0));
        let tellers: Vec<_> = (0..2)
            .map(|_| {
                let (notify, done) = (Arc::clone(&notify), Arc::clone(&done));
                thread::spawn(move || {
                    done.fetch_add(1, Ordering::SeqCst);
                    notify.notify_one();
                })
            })
            .collect();
        while done.load(Ordering::SeqCst) < 2 {
            assert!(notify.wait(), "nobody closes it yet");
        }
        notify.close();
        assert!(!notify.wait());
        for teller in tellers {
            teller.join().expect("no panic");
        }
    });
}
