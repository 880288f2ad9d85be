//! A board on which ranks that are threads show one another bytes.

use std::sync::{Condvar, Mutex};

use super::PATIENCE;

/// Where ranks meet and show one another bytes, as collectives do.
pub(super) struct Board {
    state: Mutex<Meeting>,
    changed: Condvar,
}

struct Meeting {
    round: u64,
    given: Vec<Option<Vec<u8>>>,
    seen: Vec<Vec<u8>>,
}

impl Board {
    pub(super) fn new(world: usize) -> Self {
        let given = vec![None; world];
        Self {
            state: Mutex::new(Meeting {
                round: 0,
                given,
                seen: Vec::new(),
            }),
            changed: Condvar::new(),
        }
    }

    /// What every rank gives, in rank order, once all of them have.
    pub(super) fn swap(&self, rank: usize, mine: Vec<u8>) -> Vec<Vec<u8>> {
        let mut state = self.state.lock().expect("no rank has panicked");
        let round = state.round;
        assert!(state.given[rank].is_none(), "rank {rank} is here twice");
        state.given[rank] = Some(mine);
        if state.given.iter().all(Option::is_some) {
            state.seen = state.given.iter_mut().filter_map(Option::take).collect();
            state.round += 1;
            self.changed.notify_all();
        }
        while state.round == round {
            let (next, timeout) = self
                .changed
                .wait_timeout(state, PATIENCE)
                .expect("no rank has panicked");
            state = next;
            assert!(
                !timeout.timed_out() || state.round != round,
                "a rank does not come"
            );
        }
        state.seen.clone()
    }
}
